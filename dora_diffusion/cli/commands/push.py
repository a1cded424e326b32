"""``dora-diffusion push``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dora_diffusion.cli.console.progress import tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("folder", type=Path, help="The output folder of a run.")
    parser.add_argument("repository", help="NAME/MODEL on the hub; made where there is none.")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="An adapter file of another checkpoint, with a card of its own. Default: the run's.",
    )
    parser.add_argument("--public", action="store_true", help="Let everybody see it.")


def run(args: argparse.Namespace) -> int:
    """Publish a run's output folder on the hub."""
    from dora_diffusion.export.hub import push
    from dora_diffusion.studio.jobs.checkpoints import card_of

    tell(phase="uploading")
    adapter = args.adapter
    card = card_of(args.folder, adapter) if adapter else None
    private = not args.public
    address = push(args.folder, args.repository, private=private, adapter=adapter, card=card)
    tell(phase="uploaded", address=address)
    print(address)
    return 0
