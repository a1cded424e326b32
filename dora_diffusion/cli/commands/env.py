"""``dora-diffusion env``: what to paste into a bug report."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dora_diffusion.cli.console.tables import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--runs_dir", type=Path, default=Path("runs"), help="The app's folder of runs and photos."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(args: argparse.Namespace) -> int:
    """Print versions, machine, devices, extras, caches and settings, without secrets."""
    from dora_diffusion.cli.console.environment import describe_environment

    environment = describe_environment(args.runs_dir)
    if args.json:
        print_json(asdict(environment))
    else:
        print(environment)
    return 0
