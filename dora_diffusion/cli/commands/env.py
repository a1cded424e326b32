"""``dora-diffusion env``: what to paste into a bug report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class EnvSettings(CommandSettings):
    """Settings of ``env``."""

    runs_dir: Path = flag(Path("runs"), "The app's folder of runs and photos.")
    json: bool = flag(False, "Print JSON.")


SETTINGS = EnvSettings


def run(args: EnvSettings) -> int:
    """Print versions, machine, devices, extras, caches and settings, without secrets."""
    from dora_diffusion.cli.console.environment import describe_environment

    environment = describe_environment(args.runs_dir)
    if args.json:
        print_json(asdict(environment))
    else:
        print(environment)
    return 0
