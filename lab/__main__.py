"""Commands of the laboratory: ``python -m lab COMMAND``, from a clone."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from dora_diffusion.cli.commands.parser import Parser
from dora_diffusion.cli.main import add_commands, perform
from dora_diffusion.config.command import CommandSettings
from lab.commands import AnalyzeSettings, CompareSettings
from lab.simulation.command import SimulateSettings

COMMANDS = {
    "analyze": "analyze how training changed the weights: magnitude, direction, rank",
    "compare": "train several methods on several subjects and seeds, and report what differs",
    "simulate": "plan a fleet: waiting times for workers, and costs",
}
SETTINGS: dict[str, type[CommandSettings]] = {
    "analyze": AnalyzeSettings,
    "compare": CompareSettings,
    "simulate": SimulateSettings,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is as for ``dora-diffusion``."""
    return perform(build_parser().parse_args(argv), read_settings)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    text = "Studies of training methods, analysis of weights, plans of fleets."
    parser = Parser(prog="python -m lab", description=text)
    add_commands(parser, COMMANDS, SETTINGS)
    return parser


def read_settings(args: argparse.Namespace) -> CommandSettings:
    """Return the settings of the parsed command."""
    # The package's commands show their own warnings only.
    warnings.filterwarnings("always", category=UserWarning, module=r"lab\.")
    return SETTINGS[args.command].of_arguments(args)


if __name__ == "__main__":
    sys.exit(main())
