"""How the app may be reached, and what is refused."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.config import ConfigError
from dora_diffusion.jobs.workspace import Workspace
from dora_diffusion.toy import samples_folder

AUTH_VARIABLE = "DORA_DIFFUSION_AUTH"


@dataclass(frozen=True)
class Launch:
    """How the app is served.

    Raises:
        ConfigError: If it could be reached from elsewhere by anybody, or there is no such port or
            address.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    runs_dir: Path = field(default_factory=Workspace.default_root)
    samples: Path = field(default_factory=samples_folder)
    models: tuple[str, ...] = ()
    model_folders: tuple[Path, ...] = ()
    browser: bool = False

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 1 and 65535")
        if not is_address(self.host):
            raise ConfigError(
                f"host is {self.host!r}; it must be an address of this machine, such as 127.0.0.1 "
                "(this machine alone), 0.0.0.0 (all of its addresses) or its name"
            )
        if self.is_open and self.auth is None:
            what = "--share" if self.share else f"--host {self.host}"
            raise ConfigError(
                f"{what} lets others reach this app, who could then use this machine; give "
                f"--auth NAME:PASSWORD (or set {AUTH_VARIABLE})"
            )

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's users can reach it."""
        return self.share or not is_loopback(self.host)

    def allows_model(self, name: str) -> bool:
        """Whether a base model may be loaded: any on this machine alone, else the listed ones."""
        return not self.is_open or name in self.models or name.startswith("embedded:")


def is_address(host: str) -> bool:
    """Whether a host is an IP address or can be a name: what has only numbers is an address."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        labels = host.removesuffix(".").split(".")
        is_name = all(re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", label) for label in labels)
        return is_name and not labels[-1].isdigit()


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and nobody else's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
