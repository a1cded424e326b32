"""How the app may be reached: its flags, and what is refused."""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.commands.parser import Parser
from dora_diffusion.config import ConfigError
from dora_diffusion.toy import samples_folder

AUTH_VARIABLE = "DORA_DIFFUSION_AUTH"


@dataclass(frozen=True)
class Launch:
    """How the app is served.

    Raises:
        ConfigError: If it could be reached from elsewhere by anybody, or the port is none.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    runs_dir: Path = Path("runs")
    samples: Path = field(default_factory=samples_folder)
    models: tuple[str, ...] = ()
    model_folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be between 1 and 65535")
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


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and nobody else's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_launch(argv: list[str] | None = None) -> Launch:
    """Read the app's flags.

    Raises:
        ConfigError: If they would open the app to anybody.
    """
    parser = Parser(prog="app.py", description="Teach a model your subject in the browser.")
    add_arguments(parser)
    return launch_from(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Serve the app until it is interrupted."""
    launch = launch_from(args)
    # Gradio is heavy: --help and refusals answer without it.
    from dora_diffusion.app.serve import serve

    serve(launch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the app's flags."""
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, help="Port. Default: the first free one from 7860.")
    parser.add_argument("--share", action="store_true", help="Make a public link (needs --auth).")
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help=f"Or set {AUTH_VARIABLE}.")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Where all is kept.")
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="Base models to offer; when others can reach the app, the only ones besides the "
        "embedded ones.",
    )
    parser.add_argument(
        "--model_folders",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="Folders to look for base models in. Others: DORA_DIFFUSION_MODELS, COMFYUI_PATH, "
        "A1111_PATH, and a line each in RUNS_DIR/model_folders.txt.",
    )


def launch_from(args: argparse.Namespace) -> Launch:
    """How the app is served, by its flags.

    Raises:
        ConfigError: If they would open the app to anybody.
    """
    return Launch(
        host=args.host,
        port=args.port,
        share=args.share,
        auth=_auth(args.auth or os.environ.get(AUTH_VARIABLE)),
        runs_dir=args.runs_dir,
        models=tuple(args.models),
        model_folders=tuple(args.model_folders),
    )


def _auth(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    name, _, password = text.partition(":")
    if not name or len(password) < 8:
        raise ConfigError("--auth must be NAME:PASSWORD, with a password of at least 8 characters")
    return name, password
