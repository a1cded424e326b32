"""``dora-diffusion app``."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError
from dora_diffusion.studio.app.launch import AUTH_VARIABLE, SHARED, Launch
from dora_diffusion.studio.jobs.workspace import Workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, help="Port. Default: the first free one from 7860.")
    parser.add_argument("--share", action="store_true", help="Make a public link (needs --auth).")
    parser.add_argument(
        "--allowed_host",
        dest="allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Names by which a reverse proxy reaches the app, besides its own address; requests "
        "by other names are refused (needs --auth).",
    )
    parser.add_argument(
        "--auth", metavar="NAME:PASSWORD", help=f"Login; or set {AUTH_VARIABLE}. {SHARED}"
    )
    parser.add_argument(
        "--runs_dir",
        type=Path,
        default=Workspace.default_root(),
        help="Folder of runs and photos. Default: %(default)s.",
    )
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
    parser.add_argument("--browser", action="store_true", help="Open the page in the browser.")


def run(args: argparse.Namespace) -> int:
    """Serve the app until it is interrupted."""
    launch = launch_from(args)
    # Gradio is heavy: --help and refusals answer without it.
    from dora_diffusion.studio.app.serve import serve

    serve(launch)
    return 0


def launch_from(args: argparse.Namespace) -> Launch:
    """How the app is served, by its flags.

    Raises:
        ConfigError: If they would open the app to anybody.
    """
    values: dict[str, Any] = {
        field.name: getattr(args, field.name) for field in fields(Launch) if field.name in args
    }
    values["auth"] = _auth(args.auth or os.environ.get(AUTH_VARIABLE))
    for name in ("models", "model_folders", "allowed_hosts"):
        values[name] = tuple(values[name])
    return Launch(**values)


def _auth(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    name, _, password = text.partition(":")
    if not name or len(password) < 8:
        raise ConfigError("--auth must be NAME:PASSWORD, with a password of at least 8 characters")
    return name, password
