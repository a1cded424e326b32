"""Cost of adapters when a model is used: forward passes beside the base, and switching.

    python benchmarks/evaluation_cost.py --latent 32

Two adapters are on one UNet, not merged; one is switched on. A forward pass is one of many inside
a sampling run, so that norms are computed once before; a switch is timed with the norms it needs.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from statistics import median

import torch
from common import (
    FROZEN,
    LORA,
    OURS,
    PEFT_DORA,
    interleaved,
    machine,
    make_peer,
    markdown,
    ratio,
    seconds,
    unet,
    unet_inputs,
)
from torch import nn

from dora_diffusion.adapters.inject import disabled, inject_adapters, layer_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.config import AdapterConfig


def switch(model: nn.Module, name: str) -> None:
    """Enable one adapter, and disable all others."""
    for adapter in layer_adapters(model):
        adapter.enabled = False
    for adapter in layer_adapters(model, name):
        adapter.enabled = True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    base = unet(args.family)
    paths = match_targets(base, ["attention+conv"])
    inputs = unet_inputs(args.family, args.latent, batch=2)
    names = (FROZEN, LORA, PEFT_DORA, OURS)
    models = {name: make_peer(name, base, paths, args.rank).model.eval() for name in names}
    ours = models[OURS]
    inject_adapters(ours, AdapterConfig(rank=args.rank, conv_rank=args.rank), name="other")
    switch(ours, "default")
    calls = {name: lambda model=model: model(**inputs) for name, model in models.items()}
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(norm_scope(ours))
        samples = interleaved(calls, args.rounds)
        caches = [own for _, layer in adapted_layers(ours) for own in layer.route.norms.values()]
        cached = sum(own.norm.nbytes + own.gain.nbytes for own in caches)
    print(
        f"{args.family}, guided (batch 2), {args.latent}x{args.latent} latents, attention+conv, "
        f"rank {args.rank}, unmerged. {machine()}\n"
    )
    rows = [[n, f"{median(samples[n]):.2f}", ratio(samples, n, FROZEN)] for n in names]
    print(markdown(["", "seconds", "to frozen"], rows))
    flips = [seconds(lambda name=name: switch(ours, name)) for name in ("other", "default") * 5]

    def norms() -> None:
        with norm_scope(ours):
            pass

    opened = [seconds(norms) for _ in range(5)]
    with disabled(ours), torch.no_grad():
        same = torch.equal(ours(**inputs).sample, models[FROZEN](**inputs).sample)
    print(f"\ncached in a sampling run: {cached / 1e6:.2f} MB, norms and gains")
    print(f"switching adapters: {1e3 * median(flips):.2f} ms")
    print(f"the norms of an adapter: {1e3 * median(opened):.0f} ms, once per sampling run")
    print(f"switched off, it is the base to the last bit: {same}")


if __name__ == "__main__":
    main()
