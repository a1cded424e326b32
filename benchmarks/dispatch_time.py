"""Processor time of a whole step where there is next to nothing to compute: what issuing it costs.

    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py

The structure of SD1.5 and SDXL with narrow channels, on a CPU: forward and backward, norms,
clipping and AdamW. At batch 1 a GPU waits for just this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import (
    LORA,
    OURS,
    PEERS,
    Peer,
    interleaved,
    machine,
    make_peer,
    markdown,
    ratio,
)
from full_size import UNETS
from torch import Tensor, nn

from dora_diffusion.adapters.inject import norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.numerics.fast import Watch
from dora_diffusion.training.flat import FlatParameters

NARROW: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": 2},
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": [2, 2, 2],
        "projection_class_embeddings_input_dim": 256 * 6 + 32,
    },
}


def narrow_unet(family: str) -> nn.Module:
    """A UNet with all layers of the family's, a few channels each."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings = UNETS[family] | NARROW[family]
    narrow = {"cross_attention_dim": 32, "norm_num_groups": 8, "sample_size": 16}
    return UNet2DConditionModel(**(settings | narrow)).requires_grad_(False)


def stepper(peer: Peer, forward: Callable[[nn.Module], Tensor], ours: bool) -> Callable[[], None]:
    """What does one whole step of a peer."""
    groups: list[dict[str, Any]] = [{"params": peer.parameters()}]
    flat, watch = FlatParameters(groups) if ours else None, Watch()
    seen = (flat.groups if flat else groups)[0]["params"]
    optimizer = torch.optim.AdamW(seen, lr=1e-4, fused=True)

    def step() -> None:
        with norm_scope(peer.model, watch=watch) if ours else peer.scope():
            forward(peer.model).square().mean().backward()
        if flat is not None:
            flat.take_gradients()
        torch.nn.utils.clip_grad_norm_(seen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if flat is not None:
            flat.finish()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=tuple(NARROW), default=list(NARROW))
    parser.add_argument("--peers", nargs="+", default=[LORA, OURS], choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for family in args.family:
        base = narrow_unet(family)
        paths = match_targets(base, ["attention+conv"])
        inputs: dict[str, Any] = {
            "sample": torch.randn(1, 4, 16, 16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 8, 32),
        }
        if family == "sdxl":
            ids = torch.full((1, 6), 1024.0)
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 32), "time_ids": ids}

        def forward(model: nn.Module, inputs: dict[str, Any] = inputs) -> Tensor:
            prediction: Tensor = model(**inputs).sample
            return prediction

        steps = {}
        for name in args.peers:
            peer = make_peer(name, base, paths, 4)
            steps[name] = partial(stepper(peer, forward, name == OURS))
        samples = interleaved(steps, args.rounds)
        print(f"\n{family}, narrow, attention+conv ({len(paths)} layers). {machine()}\n")
        rows = [[n, f"{median(samples[n]):.3f}", str(ratio(samples, n))] for n in samples]
        print(markdown(["", "seconds", f"to {LORA}"], rows), flush=True)


if __name__ == "__main__":
    main()
