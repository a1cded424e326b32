"""``dora-diffusion samples``: the sample subjects, to train on from any folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dora_diffusion.models.embedded import samples_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "folder", nargs="?", default="samples", help="Folder to copy to. Default: %(default)s."
    )


def run(args: argparse.Namespace) -> int:
    """Copy the sample subjects, and say how to train on them."""
    folder = copy_samples(Path(args.folder))
    for config in sorted(folder.glob("*/config.yaml")):
        print(f"dora-diffusion train --config {config}")
    return 0


def copy_samples(folder: Path) -> Path:
    """Copy the sample subjects into a new folder, whose photos their settings name.

    Raises:
        FileExistsError: If the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give another folder")
    shutil.copytree(samples_folder(), folder)
    for config in folder.glob("*/config.yaml"):
        name = config.parent.name
        text = config.read_text(encoding="utf-8")
        here = text.replace(f"samples/{name}", (folder / name).as_posix())
        config.write_text(here, encoding="utf-8")
    return folder
