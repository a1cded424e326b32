"""Processor time of a whole step where there is next to nothing to compute: what issuing it costs.

    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py
    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py --family tiny-sdxl --rounds 20

The structure of SD1.5 and SDXL with narrow channels in bf16 (peers with autocast, as Diffusers'
scripts train them), on a CPU, but with the operations that a GPU gets: forward and backward, norms,
clipping and AdamW. At batch 1 a GPU waits for just this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
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
from diffusers import UNet2DConditionModel
from full_size import UNETS
from torch import Tensor, nn

from dora_diffusion.adapters.scope import NormCache, norm_scope
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.models.embedded import MODELS, model_folder
from dora_diffusion.training.optimizer import FlatParameters

NARROW: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": 2},
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "attention_head_dim": [2, 2, 2],
        "projection_class_embeddings_input_dim": 256 * 6 + 32,
    },
}


def small_unet(family: str) -> UNet2DConditionModel:
    """A UNet with all layers of the family's, a few channels each in bf16, or an embedded one."""
    if family in MODELS:
        return UNet2DConditionModel.from_pretrained(model_folder(family), subfolder="unet")
    torch.manual_seed(0)
    settings = UNETS[family] | NARROW[family]
    narrow = {"cross_attention_dim": 32, "norm_num_groups": 8, "sample_size": 16}
    return UNet2DConditionModel(**(settings | narrow)).bfloat16()


def inputs_of(unet: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    """Random inputs of a UNet."""
    like = {"dtype": unet.dtype}
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, *2 * [config.sample_size], **like),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 8, config.cross_attention_dim, **like),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **like),
            "time_ids": torch.full((batch, 6), 1024.0),
        }
    return inputs


@dataclass
class Stepper:
    """Runner of a peer's whole steps, as training does them.

    Attributes:
        peer: The model, its adapters and its scope.
        forward: The model to its prediction.
        ours: Whether parameters are flat, flags are read a step late, and autocast is left out.
        dtype: Of autocast.
        optimizer: Over parameters; None is fused AdamW.
        scaler: Of the loss, as fp16 needs it.
    """

    peer: Peer
    forward: Callable[[nn.Module], Tensor]
    ours: bool
    dtype: torch.dtype = torch.bfloat16
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    scaler: Any = None

    def __post_init__(self) -> None:
        groups: list[dict[str, Any]] = [{"params": self.peer.parameters()}]
        self.norm_cache = NormCache()
        self.flat = FlatParameters(groups) if self.ours and self.optimizer is None else None
        self.seen = (self.flat.groups if self.flat else groups)[0]["params"]
        self.device = next(self.peer.model.parameters()).device.type
        make = self.optimizer or partial(torch.optim.AdamW, lr=1e-4, fused=True)
        self.update = make(self.seen) if self.seen else None

    def __call__(self) -> None:
        """Forward and backward pass, norms, clipping and the optimizer."""
        model, scaler = self.peer.model, self.scaler
        with norm_scope(model, cache=self.norm_cache) if self.ours else self.peer.scope():
            cast = not self.ours and self.dtype != torch.float32
            with torch.autocast(self.device, self.dtype, enabled=cast):
                prediction = self.forward(model)
            loss = prediction.float().square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if self.update is None:
            return
        if self.flat is not None:
            self.flat.take_gradients()
        if scaler is not None:
            scaler.unscale_(self.update)
        torch.nn.utils.clip_grad_norm_(self.seen, 1.0)
        if scaler is None:
            self.update.step()
        else:
            scaler.step(self.update)
            scaler.update()
        self.update.zero_grad()
        if self.flat is not None:
            self.flat.finish()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=(*NARROW, *MODELS), default=list(NARROW))
    parser.add_argument("--peers", nargs="+", default=[LORA, OURS], choices=PEERS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for family in args.family:
        base = small_unet(family).requires_grad_(False)
        paths = match_targets(base, ["attention+conv"])
        inputs = inputs_of(base, args.batch)

        def forward(model: nn.Module, inputs: dict[str, Any] = inputs) -> Tensor:
            prediction: Tensor = model(**inputs).sample
            return prediction

        steps = {}
        for name in args.peers:
            peer = make_peer(name, base, paths, 4)
            steps[name] = Stepper(peer, forward, name == OURS, base.dtype)
        samples = interleaved(steps, args.rounds)
        print(f"\n{family}, attention+conv ({len(paths)} layers). {machine()}\n")
        rows = [[n, f"{median(samples[n]):.3f}", str(ratio(samples, n))] for n in samples]
        print(markdown(["", "seconds", f"to {LORA}"], rows), flush=True)


if __name__ == "__main__":
    main()
