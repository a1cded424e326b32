"""What each part of the work on speed saves: a UNet's step without it, beside the step with all.

    OMP_NUM_THREADS=1 python benchmarks/fast_parts.py --latent 32

Forward and backward as in `unet_step`; random weights, float32. A part that saves less than 3% of
time and less than 3% of what is kept is not worth its lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from unittest import mock

import torch
from common import (
    OURS,
    Peer,
    interleaved,
    kept_bytes,
    machine,
    make_peer,
    markdown,
    ratio,
    step,
    unet_inputs,
)
from common import unet as make_unet
from full_size import UNETS

from dora_diffusion.adapters import layers
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.numerics.fast import operation, product

ALL = "all parts"
PARTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    ALL: nullcontext,
    "oneDNN for products (product)": lambda: mock.patch.object(product, "HAS_ONEDNN", False),
    "few positions as a product (operation)": lambda: mock.patch.object(
        operation, "FEW_POSITIONS", 0
    ),
    "recomputed inputs (source)": lambda: mock.patch.object(
        layers, "noted_source", return_value=None
    ),
    "all layers together (plan)": nullcontext,
}


def without(name: str, peer: Peer) -> tuple[Peer, AbstractContextManager[object]]:
    """The peer, and the patch, of a step that lacks a part."""
    if name.startswith("all layers"):
        return Peer(peer.model), nullcontext()
    return peer, PARTS[name]()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), default="sd1")
    parser.add_argument("--latent", type=int, default=32, help="side of the latents")
    parser.add_argument("--targets", default="attention+conv")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    parts = list(dict.fromkeys([ALL, *args.parts]))
    base = make_unet(args.family)
    paths = match_targets(base, [args.targets])
    inputs = unet_inputs(args.family, args.latent, 1)
    adapted = make_peer(OURS, base, paths, args.rank)

    def forward(model: torch.nn.Module) -> torch.Tensor:
        output: torch.Tensor = model(**inputs).sample
        return output

    with torch.no_grad():
        upstream = torch.randn_like(forward(base))

    def run(name: str) -> None:
        peer, patch = without(name, adapted)
        with patch:
            step(peer, forward, upstream)

    def kept(name: str) -> float:
        peer, patch = without(name, adapted)
        with patch:
            return kept_bytes(peer, forward) / 1e6

    samples = interleaved({name: partial(run, name) for name in parts}, args.rounds)
    memory = {name: kept(name) for name in parts}
    print(
        f"{args.family}, {args.targets} ({len(paths)} layers), rank {args.rank}, "
        f"{args.latent}x{args.latent} latents. {machine()}\n"
    )
    rows = [
        [
            name if name == ALL else f"without {name}",
            f"{median(samples[name]):.2f}",
            str(ratio(samples, name, ALL)),
            f"{memory[name]:.0f}",
            f"{memory[name] / memory[ALL]:.3f}",
        ]
        for name in parts
    ]
    print(markdown(["", "seconds", f"to {ALL}", "kept, MB", f"to {ALL}"], rows))


if __name__ == "__main__":
    main()
