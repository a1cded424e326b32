"""``dora-diffusion push``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("folder", help="The output folder of a run.")
    parser.add_argument("repository", help="NAME/MODEL on the hub; made where there is none.")
    parser.add_argument("--public", action="store_true", help="Let everybody see it.")


def run(args: argparse.Namespace) -> int:
    """Publish a run's output folder on the hub."""
    from dora_diffusion.hub import push

    print(push(args.folder, args.repository, private=not args.public))
    return 0
