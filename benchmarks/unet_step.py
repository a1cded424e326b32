"""Cost of DoRA on a whole UNet: one step's time and the activations it keeps, beside its peers.

    python benchmarks/unet_step.py --latent 64
    python benchmarks/unet_step.py --latent 32 --targets attention
    python benchmarks/unet_step.py --family sdxl --latent 32 --peers frozen "PEFT LoRA" "this DoRA"

Forward and backward with the gradient of the latents; random weights, float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import (
    LORA,
    PEERS,
    interleaved,
    kept_bytes,
    machine,
    make_peer,
    markdown,
    ratio,
    save,
    step,
    unet,
    unet_inputs,
)
from full_size import UNETS
from torch import Tensor, nn

from dora_diffusion.adapters.targets import match_targets


def caller(inputs: Mapping[str, object]) -> Callable[[nn.Module], Tensor]:
    """A call of a UNet with these inputs."""
    return lambda model: model(**inputs).sample


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(UNETS), default="sd1")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--targets", default="attention+conv")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--kept-only", action="store_true", help="kept activations without times")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    base = unet(args.family)
    paths = match_targets(base, [args.targets])
    forward = caller(unet_inputs(args.family, args.latent, args.batch))
    peers = {name: make_peer(name, base, paths, args.rank) for name in args.peers}
    kept = {name: kept_bytes(peer, forward) / 1e6 for name, peer in peers.items()}
    samples = {}
    if not args.kept_only:
        with torch.no_grad():
            upstream = torch.randn_like(forward(base))
        steps = {n: partial(step, peer, forward, upstream) for n, peer in peers.items()}
        samples = interleaved(steps, args.rounds)
    print(
        f"{args.family}, {args.targets} ({len(paths)} layers), rank {args.rank}, batch "
        f"{args.batch}, {args.latent}x{args.latent} latents. {machine()}\n"
    )
    rows = []
    for name in peers:
        megabytes = [f"{kept[name]:.0f}", f"{kept[name] / kept[LORA]:.3f}"]
        times = ["", ""]
        if samples:
            times = [f"{median(samples[name]):.2f}", ratio(samples, name)]
        rows.append([name, *times, *megabytes])
    print(markdown(["", "seconds", f"to {LORA}", "kept, MB", f"to {LORA}"], rows))
    save(args.json, {**vars(args), "json": None, "kept": kept, "seconds": samples})


if __name__ == "__main__":
    main()
