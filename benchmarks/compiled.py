"""Kernels of a compiled block with adapters: what `--compile` makes of a forward and backward pass.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --time --family sd1 --precision float32   # needs a C++ compiler

Counts what Inductor generates for the CPU and what it calls from libraries, for one block of each
kind in full width, PEFT's LoRA beside this DoRA; a graph break would be an error. Kernels for CUDA
need Triton, which fuses alike but not the same. Without `--time` no C++ is compiled: counts are
exact all the same, and take seconds a block.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import (
    LORA,
    OURS,
    PEERS,
    Peer,
    clock,
    interleaved,
    kept_storages,
    machine,
    make_peer,
    markdown,
    ratio,
)  # fmt: skip
from torch import Tensor, nn

from dora_diffusion.adapters.compiled import compile_blocks

CROSS = {"sd1": 768, "sdxl": 2048}
# Name: channels in and out, and the side of its map, as a family has them.
KINDS: dict[str, dict[str, tuple[int, int, int]]] = {
    "sd1": {"transformer": (320, 320, 64), "resnet": (640, 640, 32), "shortcut": (320, 640, 32)},
    "sdxl": {"transformer": (1280, 1280, 32), "resnet": (640, 640, 64), "shortcut": (320, 640, 64)},
}
_LIBRARY_CALL = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops)\.[\w.]+\(", re.MULTILINE)


class Holder(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self._repeated_blocks = block, [type(block).__name__]

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Call the block."""
        result: Tensor = self.block(*inputs)
        return result


@dataclass
class Block:
    """A block of a kind: its frozen model, what it is called with, and in which precision."""

    model: nn.Module
    inputs: tuple[Any, ...]
    low: bool

    @classmethod
    def of(cls, family: str, kind: str, dtype: torch.dtype, side: int | None) -> Block:
        """Random weights of full width; a map of a side, or of the family's."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        torch.manual_seed(0)
        narrow, wide, usual = KINDS[family][kind]
        side = side or usual
        if kind == "transformer":
            heads = 8 if family == "sd1" else wide // 64
            cross = CROSS[family]
            block: nn.Module = BasicTransformerBlock(
                wide, heads, wide // heads, cross_attention_dim=cross
            )
            prompt = torch.randn(1, 77, cross, dtype=dtype)
            inputs = (torch.randn(1, side * side, wide, dtype=dtype), None, prompt)
        else:
            block = ResnetBlock2D(in_channels=narrow, out_channels=wide, temb_channels=1280)
            temb = torch.randn(1, 1280, dtype=dtype)
            inputs = (torch.randn(1, narrow, side, side, dtype=dtype), temb)
        inputs[0].requires_grad_()
        return cls(Holder(block.to(dtype)).train(), inputs, dtype != torch.float32)

    def peer(self, name: str) -> Peer:
        """The block with a peer's adapters on all of its layers, float32 as training has them."""
        layers = [
            path for path, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        peer = make_peer(name, self.model, layers, 8)
        for parameter in peer.parameters():
            parameter.data = parameter.data.float()
        return peer

    def step(self, peer: Peer) -> None:
        """Forward and backward."""
        cast: AbstractContextManager[Any] = nullcontext()
        if self.low:
            cast = torch.autocast("cpu", torch.bfloat16)
        with peer.scope():
            with cast:
                y = peer.model(self.inputs)
            y.float().square().mean().backward()
        self.inputs[0].grad = None
        for parameter in peer.parameters():
            parameter.grad = None

    def kept(self, peer: Peer) -> int:
        """Bytes that a forward pass keeps, parameters not counted."""
        with kept_storages(peer.model.parameters()) as kept:
            self.step(peer)
        return sum(kept.values())


def compiled(block: Block, name: str) -> tuple[Peer, int, int, float]:
    """A compiled peer; kernels that Inductor generated, calls of libraries, and seconds."""
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    peer = block.peer(name)
    compile_blocks(peer.model, fullgraph=True, dynamic=False)
    metrics.reset()
    begun = clock()
    _, codes = run_and_get_code(block.step, peer)
    seconds = clock() - begun
    calls = sum(len(_LIBRARY_CALL.findall(code)) for code in codes)
    return peer, metrics.generated_kernel_count, calls, seconds


def _no_kernel(self: Any, *source: Any) -> Callable[..., None]:
    return lambda *args: None


def count(block: Block, name: str) -> list[Any]:
    """A peer's line: kernels, library calls, together, kept MB."""
    from torch._inductor.async_compile import AsyncCompile

    with mock.patch.object(AsyncCompile, "cpp_pybinding", _no_kernel):
        peer, kernels, calls, _ = compiled(block, name)
        kept = block.kept(peer) / 1e6
    return [kernels, calls, kernels + calls, kept]


def time(block: Block, peers: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, by peer, as it is and compiled."""
    steps = {}
    for name in peers:
        steps[name] = partial(block.step, block.peer(name))
        peer, *_, seconds = compiled(block, name)
        print(f"{name}: compiled in {seconds:.0f} s")
        steps[f"{name}, compiled"] = partial(block.step, peer)
    return interleaved(steps, rounds)


def main() -> None:
    """Count, or time, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--kind", nargs="+", default=list(KINDS["sd1"]))
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--side", type=int, help="of the map; default: as at the full resolution")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[LORA, OURS])
    parser.add_argument("--time", action="store_true", help="compile C++ too, and time steps")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    print(machine())
    rows: list[list[Any]] = []
    for family in args.family:
        for precision in args.precision:
            for kind in args.kind:
                block = Block.of(family, kind, getattr(torch, precision), args.side)
                if args.time:
                    samples = time(block, args.peers, args.rounds)
                    base = next(iter(samples))
                    rows += [
                        [family, precision, kind, name, f"{statistics.median(values):.3f}",
                         str(ratio(samples, name, base))]
                        for name, values in samples.items()
                    ]  # fmt: skip
                    continue
                counts = {name: count(block, name) for name in args.peers}
                first = counts[args.peers[0]]
                for name, (kernels, calls, total, kept) in counts.items():
                    rows.append(
                        [family, precision, kind, name, kernels, calls, f"{total / first[2]:.2f}",
                         f"{kept:.1f}", f"{kept / first[3]:.2f}"]
                    )  # fmt: skip
                print(*rows[-len(counts) :], sep="\n", flush=True)
    first = f"to {args.peers[0]}"
    header = ["", "precision", "block", "", "kernels", "library calls", first, "kept, MB", first]
    if args.time:
        header = ["", "precision", "block", "", "seconds", f"{first}, not compiled"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
