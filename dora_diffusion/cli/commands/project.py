"""Commands about the project itself: ``samples`` to train on, ``doctor`` for the installation."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from dora_diffusion.cli.console.output import print_json
from dora_diffusion.cli.settings import AnyBase
from dora_diffusion.config.base import OfModel
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag
from dora_diffusion.models.embedded import samples_folder


@dataclass(frozen=True, kw_only=True)
class SamplesSettings(CommandSettings):
    """Settings of ``samples``."""

    folder: Path = flag(Path("samples"), "Folder to copy to. Default: samples.", positional=True)

    def perform(self) -> int:
        """Copy the sample subjects, and print the commands that train on them."""
        folder = copy_samples(self.folder)
        for config in sorted(folder.glob("*/config.yaml")):
            print(f"dora-diffusion train --config {config}")
        return 0


def copy_samples(folder: Path) -> Path:
    """Copy the sample subjects into a new folder, with its paths in their settings.

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


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(AnyBase):
    """Settings of ``doctor``."""

    model_config: str | None = flag(
        None,
        "Diffusers folder with the configuration of a single-file base.",
        needs=(OfModel("base", "base", "file"),),
    )
    json: bool = flag(False, "Print JSON.")

    def perform(self) -> int:
        """Print the findings, without secrets. Returns 1 if one is a problem."""
        from dora_diffusion.cli.console.environment import describe_environment

        environment = describe_environment(self.base_model)
        if self.json:
            print_json(asdict(environment))
        else:
            print(environment)
        return int(any(finding.state == "PROBLEM" for finding in environment.findings))
