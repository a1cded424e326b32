"""Command line of the pretraining stages."""

from __future__ import annotations

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dora_diffusion.embedded.pretrain",
        description="Make the embedded models.",
    )
    parser.add_argument(
        "stage", choices=("data", "instrument", "vae", "latents", "diffusion", "card")
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and states")
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget of a training")
    return parser


def main() -> None:
    """Run one stage."""
    arguments = _parser().parse_args()
    if arguments.stage == "data":
        from dora_diffusion.embedded.pretrain.data import write_pictures

        write_pictures(arguments.work)
    elif arguments.stage == "vae":
        from dora_diffusion.embedded.pretrain.vae import train_vae

        train_vae(arguments.work, arguments.minutes)


if __name__ == "__main__":
    main()
