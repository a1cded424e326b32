"""A batch whose images have each its own adapter, beside the same batch of the base.

    python benchmarks/mixed_batch.py --latent 64 --ranks 4 8 16 32

Peers: the base; all rows with one adapter; each row with its own; and the rows of one adapter after
those of another, which shares nothing. The norms of adapters that were used before are kept, as a
pool keeps them; each call puts the batch's factors together, as the first step of a sampling run
does. ``--norms`` has each call compute the norms too, as the first use of an adapter does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from unittest import mock

import torch
from common import interleaved, machine, markdown, ratio, unet, unet_inputs
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters, layer_adapters, remove_adapters
from dora_diffusion.adapters.scope import FixedNorms, NormCache, row_scope
from dora_diffusion.config import AdapterConfig

BASE, ONE, OWN, TURNS = "base", "one adapter", "each its own", "adapter by adapter"
PEERS = (ONE, OWN, TURNS)


def timed(
    model: nn.Module,
    inputs: dict[str, object],
    names: list[str],
    rounds: int,
    peers: list[str],
    cache: NormCache | None,
) -> dict[str, list[float]]:
    """Seconds of a forward pass of each peer, round by round."""
    rows = {BASE: [None] * len(names), ONE: names[:1] * len(names), OWN: names, TURNS: names}
    rows = {peer: rows[peer] for peer in (BASE, *peers)}

    def call(peer: str) -> None:
        never = mock.patch("dora_diffusion.adapters.norm_routes._are_batched", return_value=False)
        with (
            row_scope(model, rows=rows[peer], cache=cache),
            never if peer == TURNS else nullcontext(),
        ):
            model(**inputs)

    calls: dict[str, Callable[[], object]] = {peer: partial(call, peer) for peer in rows}
    with torch.no_grad():
        return interleaved(calls, rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--norms", action="store_true")
    args = parser.parse_args()
    model = unet(args.family).eval()
    inputs = unet_inputs(args.family, args.latent, batch=args.batch)
    names, table = [f"subject{number}" for number in range(args.batch)], []
    for rank in args.ranks:
        config = AdapterConfig(targets=("attention+conv",), rank=rank, conv_rank=rank)
        for name in names:
            inject_adapters(model, config, name=name)
        with torch.no_grad():
            for adapter in layer_adapters(model):
                adapter.up.normal_(std=1e-2)
        cache = None if args.norms else FixedNorms()
        samples = timed(model, inputs, names, args.rounds, args.peers, cache)
        ratios = [ratio(samples, peer, BASE) for peer in args.peers]
        table.append([rank, f"{median(samples[BASE]):.2f}", *ratios])
        remove_adapters(model)
    print(
        f"{args.family}, batch {args.batch}, {args.latent}x{args.latent} latents, attention+conv, "
        f"norms {'computed in each call' if args.norms else 'kept'}. {machine()}\n"
    )
    print(markdown(["rank", "base, seconds", *args.peers], table))


if __name__ == "__main__":
    main()
