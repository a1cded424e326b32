"""``dora-diffusion samples``: the sample subjects, to train on from any folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag
from dora_diffusion.models.embedded import samples_folder


@dataclass(frozen=True, kw_only=True)
class SamplesSettings(CommandSettings):
    """Settings of ``samples``."""

    folder: Path = flag(Path("samples"), "Folder to copy to. Default: samples.", positional=True)


SETTINGS = SamplesSettings


def run(args: SamplesSettings) -> int:
    """Copy the sample subjects, and say how to train on them."""
    folder = copy_samples(args.folder)
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
