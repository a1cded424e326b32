"""Command line of the pretraining stages."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch


def _data(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.data import write_pictures

    write_pictures(work)


def _instrument(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.instrument import train_instrument

    train_instrument(work, minutes, work / "instrument")


def _vae(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.vae import train_vae

    train_vae(work, minutes)


def _latents(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.latents import write_captions, write_latents
    from dora_diffusion.embedded.pretrain.tokenizer import build_tokenizer

    write_captions(work, build_tokenizer(work / "tokenizer"))
    write_latents(work)


def _diffusion(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.diffusion import train_diffusion

    train_diffusion(work, minutes)


def _ship(work: Path, minutes: float) -> None:
    from dora_diffusion.embedded.pretrain.ship import ship

    print(ship(work))


STAGES: dict[str, Callable[[Path, float], None]] = {
    "data": _data,
    "instrument": _instrument,
    "vae": _vae,
    "latents": _latents,
    "diffusion": _diffusion,
    "ship": _ship,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dora_diffusion.embedded.pretrain",
        description="Make the embedded models.",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and states")
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget of a training")
    return parser


def main() -> None:
    """Run one stage."""
    arguments = _parser().parse_args()
    # Parallelism comes from processes; a forked torch that has used its own threads can hang.
    torch.set_num_threads(1)
    STAGES[arguments.stage](arguments.work, arguments.minutes)


if __name__ == "__main__":
    main()
