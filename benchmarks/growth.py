"""Growth of a step's cost: with the rank, the batch, the resolution and the adapted layers.

    python benchmarks/growth.py

Each line changes one thing against SD1.5 at 32x32 latents, batch 1, rank 8, attention+conv, and
gives the growth of the frozen UNet, of PEFT's LoRA and of this DoRA from that start.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from common import (
    FROZEN,
    LORA,
    OURS,
    interleaved,
    machine,
    make_peer,
    markdown,
    ratio,
    step,
    unet,
    unet_inputs,
)
from torch import nn

from dora_diffusion.adapters.targets import match_targets

NAMES = (FROZEN, LORA, OURS)


@dataclass(frozen=True)
class Case:
    """One way to train."""

    rank: int = 8
    batch: int = 1
    latent: int = 32
    targets: str = "attention+conv"


def cases(start: Case) -> dict[str, Case]:
    """Return the cases that are compared with the start."""
    return {
        f"rank {start.rank} → {start.rank // 2}": replace(start, rank=start.rank // 2),
        f"rank {start.rank} → {4 * start.rank}": replace(start, rank=4 * start.rank),
        f"rank {start.rank} → {16 * start.rank}": replace(start, rank=16 * start.rank),
        f"batch {start.batch} → {4 * start.batch}": replace(start, batch=4 * start.batch),
        f"side {start.latent} → {2 * start.latent}": replace(start, latent=2 * start.latent),
        "cross-attention only": replace(start, targets="cross-attention"),
        "attention only": replace(start, targets="attention"),
    }


def measure(base: nn.Module, case: Case, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Number of adapted layers, and seconds per step of each peer."""
    paths = match_targets(base, [case.targets])
    inputs = unet_inputs("sd1", case.latent, case.batch)

    def forward(model: nn.Module) -> torch.Tensor:
        return model(**inputs).sample

    with torch.no_grad():
        upstream = torch.randn_like(forward(base))
    peers = {name: make_peer(name, base, paths, case.rank) for name in NAMES}
    steps = {name: partial(step, peer, forward, upstream) for name, peer in peers.items()}
    return len(paths), interleaved(steps, rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    base, start = unet("sd1"), Case(latent=args.latent)
    print(f"SD1.5, {start.latent}x{start.latent} latents. {machine()}\n")
    layers, first = measure(base, start, args.rounds)
    rows = [["the start", layers, *["1.00"] * 3, ratio(first, LORA, FROZEN), ratio(first, OURS)]]
    for name, case in cases(start).items():
        layers, samples = measure(base, case, args.rounds)
        growth = [f"{median(samples[n]) / median(first[n]):.2f}" for n in NAMES]
        rows.append([name, layers, *growth, ratio(samples, LORA, FROZEN), ratio(samples, OURS)])
        print(*rows[-1], sep=" | ", flush=True)
    grown = [f"{name}, growth" for name in NAMES]
    header = ["", "layers", *grown, f"{LORA} to {FROZEN}", f"{OURS} to {LORA}"]
    print("\n" + markdown(header, rows))


if __name__ == "__main__":
    main()
