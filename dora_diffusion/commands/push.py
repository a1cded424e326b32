"""``dora-diffusion push``."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Publish a run's output folder on the hub."""
    from dora_diffusion.hub import push

    print(push(args.folder, args.repository, private=not args.public))
    return 0
