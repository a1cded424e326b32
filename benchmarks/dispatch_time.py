"""Cost of issuing a whole step: processor time, or instructions without kernels.

    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py
    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py --family tiny-sdxl --rounds 20
    OMP_NUM_THREADS=1 python benchmarks/dispatch_time.py --instructions    # needs valgrind

The structure of SD1.5 and SDXL with narrow channels in bf16 (peers with autocast, as Diffusers'
scripts train them), on a CPU, but with the operations that a GPU gets: forward and backward, norms,
clipping and AdamW. At batch 1 a GPU waits for just this. The step of this DoRA is the step of a
training run; its other peers are loops of other programs, which open a norm scope for each step.

Times include the kernels, although these have little to compute. Instructions are counted in a
process of its own, and those of kernels are left out (`instructions`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from common import (
    FROZEN,
    LORA,
    OUR_WAYS,
    OURS,
    PEERS,
    Peer,
    flat_by_role,
    interleaved,
    machine,
    make_peer,
    markdown,
    ratio,
)
from diffusers import UNet2DConditionModel
from full_size import UNETS
from instructions import collect, instrument, issuing, profiles
from torch import Tensor, nn

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.adapters.stack import AdapterStack
from dora_diffusion.adapters.targets import match_targets
from dora_diffusion.models.embedded import MODELS, model_folder
from dora_diffusion.training.optimizer import FlatParameters
from dora_diffusion.training.step import stack_of

NARROW: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32, 32, 32),
        "attention_head_dim": 2,
        # With 16, maps of 2x2, on which a CPU computes A's convolutions in float32.
        "sample_size": 32,
    },
    "sdxl": {
        "sample_size": 16,
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
    narrow = {"cross_attention_dim": 32, "norm_num_groups": 8}
    return UNet2DConditionModel(**(settings | narrow)).bfloat16()


def inputs_of(unet: UNet2DConditionModel, batch: int, side: int = 0) -> dict[str, Any]:
    """Random inputs of a UNet, of its sample size by default."""
    like = {"dtype": unet.dtype}
    config = unet.config
    size = 2 * [side or config.sample_size]
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, *size, **like),
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


@contextmanager
def run_scope(stack: AdapterStack) -> Iterator[None]:
    """Open what a training run opens for a step."""
    with stack.scope(), stack.of(0):
        yield


@dataclass
class Stepper:
    """Runner of a peer's whole steps, as training does them.

    Attributes:
        peer: The model, its adapters and its scope.
        forward: The model to its prediction.
        name: The peer's name. A training run has its adapters in a stack and flat parameters; the
            peers of other libraries need autocast.
        dtype: Of autocast.
        optimizer: Over parameters; None is fused AdamW.
        scaler: Of the loss, as fp16 needs it.
    """

    peer: Peer
    forward: Callable[[nn.Module], Tensor]
    name: str
    dtype: torch.dtype = torch.bfloat16
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    scaler: Any = None

    def __post_init__(self) -> None:
        self.seen, self.scope = self.peer.parameters(), self.peer.scope
        self.flat: FlatParameters | None = None
        if self.name == OURS:
            adapters = AdapterSet.of(self.peer.model)
            if self.optimizer is None:
                self.flat = flat_by_role(adapters.trained(), adapters.parameters())
                self.seen = list(self.flat)
            stack = stack_of(adapters, memory=None if self.flat is None else self.flat.memory)
            self.scope = partial(run_scope, stack)
        self.device = next(self.peer.model.parameters()).device.type
        make = self.optimizer or partial(torch.optim.AdamW, lr=1e-4, fused=True)
        self.update = make(self.seen) if self.seen else None

    def __call__(self) -> None:
        """Forward and backward pass, norms, clipping and the optimizer."""
        model, scaler = self.peer.model, self.scaler
        with self.scope():
            cast = self.name not in OUR_WAYS and self.dtype != torch.float32
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


def make_steps(
    family: str, names: Sequence[str], batch: int = 1, side: int = 0
) -> dict[str, Stepper]:
    """Steps of peers on one base, with DoRA or LoRA on attention and convolutions."""
    base = small_unet(family).requires_grad_(False)
    paths = match_targets(base, ["attention+conv"])
    steps = {}
    for name in names:
        inputs = inputs_of(base, batch, side)
        # Without trained parameters, the latents require a gradient.
        inputs["sample"].requires_grad_(name == FROZEN)

        def forward(model: nn.Module, inputs: dict[str, Any] = inputs) -> Tensor:
            prediction: Tensor = model(**inputs).sample
            return prediction

        steps[name] = Stepper(make_peer(name, base, paths, 4), forward, name, base.dtype)
    return steps


def collect_steps(steps: dict[str, Stepper]) -> None:
    """Count the instructions of a step of each peer, after its first steps."""
    for step in steps.values():
        for _ in range(3):
            step()
    instrument()
    for step in steps.values():
        collect(step)


def instruction_table(family: str, args: argparse.Namespace) -> str:
    """Count in another process."""
    settings = ["--batch", str(args.batch), "--sample-size", str(args.sample_size)]
    command = [__file__, "--family", family, *settings, "--collect", "--peers", *args.peers]
    counts = dict(zip(args.peers, profiles(command), strict=True))
    lora = issuing(counts[LORA])
    rows = []
    for name, profile in counts.items():
        count = issuing(profile)
        kernels = (profile.total() - count) / 1e6
        rows.append([name, f"{count / 1e6:.1f}", f"{count / lora:.3f}", f"{kernels:.1f}"])
    header = ["", "M instructions to issue a step", f"to {LORA}", "M instructions of kernels"]
    return markdown(header, rows)


def time_table(family: str, args: argparse.Namespace) -> str:
    """Time the peers in turns."""
    steps = make_steps(family, args.peers, args.batch, args.sample_size)
    samples = interleaved(steps, args.rounds)
    rows = [[n, f"{median(samples[n]):.3f}", str(ratio(samples, n))] for n in samples]
    return markdown(["", "seconds", f"to {LORA}"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=(*NARROW, *MODELS), default=list(NARROW))
    names = dict.fromkeys((*PEERS, *OUR_WAYS))
    parser.add_argument("--peers", nargs="+", default=[LORA, OURS], choices=names)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sample-size", type=int, default=0, help="side of the latents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instructions", action="store_true", help="count, if there is valgrind")
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.peers = list(dict.fromkeys([LORA, *args.peers]))
    counts = args.instructions and shutil.which("valgrind") is not None
    if args.instructions and not counts:
        print("valgrind is not installed: steps are timed", file=sys.stderr)
    for family in args.family:
        if args.collect:
            collect_steps(make_steps(family, args.peers, args.batch, args.sample_size))
            continue
        table = (instruction_table if counts else time_table)(family, args)
        print(f"\n{family}, attention+conv. {machine()}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
