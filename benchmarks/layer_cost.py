"""Cost of DoRA, layer by layer, over all adapted layer shapes of a UNet.

    python benchmarks/layer_cost.py --family sd1
    python benchmarks/layer_cost.py --family sdxl --rounds 3

Each shape runs one optimizer step's forward and backward, with the gradient of its input or
(`--no-input`) without, on each peer in turns. Totals weigh a shape by how often the UNet has it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from common import (
    LORA,
    PEERS,
    LayerShape,
    interleaved,
    layer_shapes,
    machine,
    make_peer,
    markdown,
    ratio,
    save,
    step,
)
from torch import nn

LATENTS = {"sd1": 64, "sdxl": 128}


def measure(
    shape: LayerShape, peers: tuple[str, ...], rank: int, rounds: int, with_input: bool
) -> dict[str, list[float]]:
    """Seconds per step of each peer on one layer."""
    base = nn.Sequential(shape.make())
    x = torch.randn(shape.input).requires_grad_(with_input)
    with torch.no_grad():
        upstream = torch.randn_like(base(x))
    steps = {
        name: partial(step, make_peer(name, base, ["0"], rank), lambda model: model(x), upstream)
        for name in peers
    }
    return interleaved(steps, rounds, at_least=0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(LATENTS), default="sd1")
    parser.add_argument("--latent", type=int, help="side of the latents; default: the family's")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--only", default="", help="shapes whose text contains this")
    parser.add_argument("--no-input", action="store_true", help="without the input's gradient")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    peers = tuple(args.peers)
    shapes = layer_shapes(args.family, args.latent or LATENTS[args.family])
    print(f"{args.family}, rank {args.rank}, times relative to {LORA}. {machine()}\n")
    rows, totals, figures = [], dict.fromkeys(peers, 0.0), []
    for shape, count in shapes.items():
        if args.only not in str(shape):
            continue
        samples = measure(shape, peers, args.rank, args.rounds, not args.no_input)
        ratios = {name: ratio(samples, name) for name in peers}
        for name in peers:
            totals[name] += count * sorted(samples[name])[args.rounds // 2]
        milliseconds = 1e3 * sorted(samples[LORA])[args.rounds // 2]
        row = [count, shape, f"{milliseconds:.1f}", *(ratios[n] for n in peers if n != LORA)]
        rows.append(row)
        figures.append(
            {"shape": str(shape), "count": count, "milliseconds": milliseconds}
            | {"ratios": {name: [r.median, r.spread] for name, r in ratios.items()}}
        )
        print(*row, sep=" | ", flush=True)
    header = ["layers", "shape", f"{LORA}, ms", *(name for name in peers if name != LORA)]
    weighted = [f"{totals[n] / totals[LORA]:.2f}" for n in peers if n != LORA]
    rows.append(
        [
            sum(row[0] for row in rows),
            "all, weighted by count",
            f"{1e3 * totals[LORA]:.0f}",
            *weighted,
        ]
    )
    print("\n" + markdown(header, rows))
    save(args.json, {"family": args.family, "layers": figures, "totals": totals})


if __name__ == "__main__":
    main()
