"""Settings of the app's server, and access control."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.config import ConfigError
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag
from dora_diffusion.formats.files.runs import runs_folder
from dora_diffusion.system import is_address, is_loopback, is_number, plain_host, split_host

AUTH_VARIABLE = "DORA_DIFFUSION_AUTH"
SHARED = "All users see, change and delete the same photos and runs."
_PORTS = {"http": "80", "https": "443"}


@dataclass(frozen=True, kw_only=True)
class Launch(CommandSettings):
    """Settings of the app's server.

    Raises:
        ConfigError: If the app would be reachable from other machines without a login, or a port,
            address or name is invalid.
    """

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int | None = flag(None, "Port; 0 is any free one. Default: the first free one from 7860.")
    share: bool = flag(False, "Make a public link (needs --auth).")
    allowed_hosts: list[str] = flag(
        [],
        "Host names of the app behind a reverse proxy; requests with other names are refused "
        "(needs --auth).",
        flags=("--allowed_host",),
        metavar="NAME",
    )
    auth: str | None = flag(
        None,
        f"Logins, separated by commas; or set {AUTH_VARIABLE}. {SHARED}",
        metavar="NAME:PASSWORD",
    )
    runs_dir: Path = flag(runs_folder(), "Folder of runs and photos.")
    models: list[str] = flag(
        [],
        "Base models to offer. A shared app offers only these and the embedded ones.",
        metavar="MODEL",
    )
    model_folders: list[Path] = flag(
        [],
        "Folders to search for base models, in addition to the hub's cache.",
        metavar="FOLDER",
    )
    browser: bool = flag(False, "Open the page in the browser.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 0 and 65535", "port")
        if not is_address(self.host):
            raise ConfigError(
                f"host is {self.host!r}; it must be an address of this machine, such as 127.0.0.1 "
                "(this machine alone), 0.0.0.0 (all of its addresses) or its name",
                "host",
            )
        for name in self.allowed_hosts:
            if not is_address(name):
                raise ConfigError(
                    f"allowed_host is {name!r}; it must be a name such as studio.example.org, "
                    "without https:// and port",
                    "allowed_hosts",
                )
        if not self.logins and self.is_open:
            option = "--share" if self.share else f"--host {self.host}"
            if not self.share and is_loopback(self.host):
                option = f"--allowed_host {' '.join(self._proxied)}"
            raise ConfigError(
                f"{option} lets others reach this app, who could then use this machine; give "
                f"--auth NAME:PASSWORD (or set {AUTH_VARIABLE})",
                "auth",
            )

    @property
    def logins(self) -> dict[str, str]:
        """Passwords by user name; empty for no login.

        Raises:
            ConfigError: If a login is malformed, a password is too short, or a name is repeated.
        """
        text, logins = self.auth or os.environ.get(AUTH_VARIABLE), dict[str, str]()
        for login in text.split(",") if text else ():
            name, _, password = login.partition(":")
            if not name or len(password) < 8 or name in logins:
                raise ConfigError(
                    "--auth must be NAME:PASSWORD, with a password of at least 8 characters and no "
                    "comma; of several people NAME:PASSWORD,NAME:PASSWORD, each with another name",
                    "auth",
                )
            logins[name] = password
        return logins

    @property
    def is_open(self) -> bool:
        """True if users of other machines can reach the app."""
        return self.share or not is_loopback(self.host) or bool(self._proxied)

    @property
    def _proxied(self) -> list[str]:
        """Names under which other machines reach the app through a proxy."""
        return [name for name in self.allowed_hosts if not is_loopback(name)]

    def allows_model(self, name: str) -> bool:
        """Return whether a base model may be loaded. A shared app only loads listed models."""
        return not self.is_open or name in self.models or name.startswith("embedded:")

    def refusal(self, headers: Mapping[str, Sequence[str]], shared: Collection[str] = ()) -> str:
        """Return the reason for refusing a request, with the fix; empty if it is accepted.

        A malicious web page can point its own name at this machine (DNS rebinding), which Host
        shows. It can also make the browser send requests here, which Origin and Sec-Fetch-Site
        show.

        Args:
            headers: Headers of the request by lower-case name.
            shared: Host names of the share link.
        """
        named = {*map(plain_host, self.allowed_hosts), *map(plain_host, shared)}
        hosts = [split_host(value) for value in headers.get("host", ())]
        if not hosts or not all(self._answers_to(name, named) for name, _ in hosts):
            return (
                "This is not an address of the app. Open the address that it printed at its start, "
                "or restart it with --allowed_host and this name."
            )
        is_ours = all(
            _is_same(origin, hosts[0]) or _split_origin(origin)[0] in named
            for origin in headers.get("origin", ())
        )
        # Any page may link here, but not embed the app in frames, images or scripts.
        is_linked = "document" in headers.get("sec-fetch-dest", ())
        is_foreign = {"cross-site", "same-site"}.intersection(headers.get("sec-fetch-site", ()))
        if is_ours and (is_linked or not is_foreign):
            return ""
        return (
            "The app refuses requests from other pages. Open it in a separate tab; behind a proxy, "
            "restart it with --allowed_host and the name of this page."
        )

    def _answers_to(self, name: str, named: Collection[str]) -> bool:
        """Return whether a host name is one of the app's. Any numeric address is accepted."""
        if is_loopback(name) or name in named or name == plain_host(self.host):
            return True
        if is_loopback(self.host):
            return False
        hostname = plain_host(socket.gethostname())
        return name in (hostname, f"{hostname}.local") or is_number(name)


def _split_origin(origin: str) -> tuple[str, str]:
    """Split ``https://name:port`` into name and port; add the default port if it is missing."""
    scheme, _, host = origin.partition("://")
    name, port = split_host(host)
    return name, port or _PORTS.get(scheme, "")


def _is_same(origin: str, host: tuple[str, str]) -> bool:
    """Return whether a page's origin is the requested host."""
    name, port = host
    return _split_origin(origin) == (name, port or _PORTS.get(origin.partition("://")[0], "-"))
