"""``dora-diffusion app``."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag
from dora_diffusion.studio.app.launch import AUTH_VARIABLE, SHARED, Launch
from dora_diffusion.studio.jobs.store import Workspace


@dataclass(frozen=True, kw_only=True)
class AppSettings(CommandSettings):
    """Settings of ``app``."""

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int | None = flag(None, "Port. Default: the first free one from 7860.")
    share: bool = flag(False, "Make a public link (needs --auth).")
    allowed_hosts: list[str] = flag(
        [],
        "Names by which a reverse proxy reaches the app, besides its own address; requests by "
        "other names are refused (needs --auth).",
        flags=("--allowed_host",),
        metavar="NAME",
    )
    auth: str | None = flag(
        None, f"Login; or set {AUTH_VARIABLE}. {SHARED}", metavar="NAME:PASSWORD"
    )
    runs_dir: Path = flag(Workspace.default_root(), "Folder of runs and photos.")
    models: list[str] = flag(
        [],
        "Base models to offer; when others can reach the app, the only ones besides the embedded "
        "ones.",
        metavar="MODEL",
    )
    model_folders: list[Path] = flag(
        [],
        "Folders to look for base models in. Others: DORA_DIFFUSION_MODELS, COMFYUI_PATH, "
        "A1111_PATH, and a line each in RUNS_DIR/model_folders.txt.",
        metavar="FOLDER",
    )
    browser: bool = flag(False, "Open the page in the browser.")


SETTINGS = AppSettings


def run(args: AppSettings) -> int:
    """Serve the app until it is interrupted."""
    launch = launch_from(args)
    # Gradio is heavy: --help and refusals answer without it.
    from dora_diffusion.studio.app.serve import serve

    serve(launch)
    return 0


def launch_from(args: AppSettings) -> Launch:
    """Return the app's server settings, by its flags.

    Raises:
        ConfigError: If they would open the app to anybody.
    """
    names = [field.name for field in fields(Launch) if hasattr(args, field.name)]
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
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
