"""A Hugging Face Space that is the app, for its owner: only people with the password can use it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dora_diffusion.cli.main import main


def arguments(environment: Mapping[str, str], disk: Path = Path("/data")) -> list[str]:
    """Return the command line of the app in a Space.

    Args:
        environment: Variables and secrets of the Space.
        disk: Persistent storage, if the Space has any.
    """
    if not environment.get("DORA_DIFFUSION_AUTH"):
        raise SystemExit(
            "error: the Space has no secret DORA_DIFFUSION_AUTH, so everybody could train on its "
            "hardware and see its photos; add NAME:PASSWORD as this secret in Settings"
        )
    words = ["app", "--host", environment.get("GRADIO_SERVER_NAME", "0.0.0.0")]
    words += ["--port", environment.get("GRADIO_SERVER_PORT", "7860")]
    words += ["--runs_dir", str((disk if disk.is_dir() else Path()) / "runs")]
    for flag, variable in (("--allowed_host", "SPACE_HOST"), ("--models", "BASE_MODELS")):
        if names := environment.get(variable, "").split():
            words += [flag, *names]
    return words


if __name__ == "__main__":
    sys.exit(main(arguments(os.environ)))
