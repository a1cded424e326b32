"""Frozen random projections that all layers share, reproducible from a seed.

VeRA (arXiv:2310.11454) trains vectors between two random matrices that are not saved. The matrices
must be reproducible exactly, with every version of every library on every device. They are
therefore drawn by an implementation of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in this
module, in integers modulo 2^64, each entry from its index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BITS = 24  # Precision of float32.
Kernel = tuple[int, ...]


@dataclass(frozen=True)
class Projections:
    """A and B of the largest layer. Smaller layers use the first columns of A and rows of B.

    They are drawn from U(-b, b) with ``b = sqrt(6 / fan_in)`` (Kaiming), as in the paper.

    Attributes:
        seed: Random seed.
        rank: Rank r.
        outputs: Number of output features of the largest layer, the rows of B.
        inputs: Number of input features of the largest layer by kernel size, ``(1, 1)`` for a
            Linear. Each kernel size has its own A.

    Raises:
        ValueError: If a size is not positive, or the seed negative.
    """

    seed: int
    rank: int
    outputs: int
    inputs: Mapping[Kernel, int]

    def __post_init__(self) -> None:
        sizes = (self.rank, self.outputs, *self.inputs.values(), *sum(self.inputs, ()))
        if min(sizes) < 1 or not 0 <= self.seed < 2**63 or not self.inputs:
            raise ValueError(f"sizes must be positive and the seed not negative, got {self}")

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], rank: int, seed: int) -> Projections:
        """Build projections for weights of shapes ``(out, in, *k)``."""
        shapes = list(shapes)
        inputs: dict[Kernel, int] = {}
        for shape in shapes:
            kernel = kernel_of(shape)
            inputs[kernel] = max(shape[1], inputs.get(kernel, 0))
        return cls(seed, rank, max(shape[0] for shape in shapes), dict(sorted(inputs.items())))

    def has(self, shape: tuple[int, ...]) -> bool:
        """Return whether the projections are large enough for a weight."""
        return shape[0] <= self.outputs and shape[1] <= self.inputs.get(kernel_of(shape), 0)

    @cached_property
    def matrices(self) -> dict[Kernel | None, Tensor]:
        """A ``(r, in, *k)`` by kernel size, and B ``(out, r)`` under None; float32 on the CPU."""
        drawn: dict[Kernel | None, Tensor] = {}
        for number, (kernel, width) in enumerate(sorted(self.inputs.items())):
            drawn[kernel] = _kaiming(self.seed, 1 + number, (self.rank, width, *kernel))
        drawn[None] = _kaiming(self.seed, 0, (self.outputs, self.rank))
        return drawn

    def factors(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A ``(r, in, *k)`` and B ``(out, r, ...)`` of a weight, views of the matrices."""
        matrices = self._on(device)
        down = matrices[kernel_of(shape)][:, : shape[1]]
        up = matrices[None][: shape[0]]
        if len(shape) == 2:
            return down.flatten(1), up
        return down, up.view(*up.shape, *[1] * (len(shape) - 2))

    def _on(self, device: torch.device) -> dict[Kernel | None, Tensor]:
        cache = self._by_device
        if device not in cache:
            cache[device] = {kernel: matrix.to(device) for kernel, matrix in self.matrices.items()}
        return cache[device]

    @cached_property
    def _by_device(self) -> dict[torch.device, dict[Kernel | None, Tensor]]:
        return {torch.device("cpu"): self.matrices}


def kernel_of(shape: tuple[int, ...]) -> Kernel:
    """Return the kernel size of a weight, ``(1, 1)`` for a Linear."""
    return tuple(shape[2:]) or (1, 1)


def _kaiming(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Draw from U(-b, b) with ``b = sqrt(6 / fan_in)``."""
    bound = torch.tensor(math.sqrt(6 / math.prod(shape[1:])), dtype=torch.float32)
    return uniform(seed, stream, math.prod(shape)).mul_(bound).view(shape)


def uniform(seed: int, stream: int, count: int) -> Tensor:
    """Draw from U(-1, 1), ``(count,)``, float32: odd multiples of 2^-24.

    Value i is given by the upper 24 bits of SplitMix64's output after i + 1 steps. The initial
    state is itself an output, for a state of seed and stream.
    """
    start = _mixed(torch.tensor([seed], dtype=torch.int64) * _signed(_STEP) + stream)
    states = start + torch.arange(1, count + 1, dtype=torch.int64) * _signed(_STEP)
    bits = _shifted(_mixed(states), 64 - _BITS)
    drawn: Tensor = (2 * bits + 1 - 2**_BITS).float() / 2**_BITS
    return drawn


def _mixed(state: Tensor) -> Tensor:
    """Return the output of SplitMix64 for a state."""
    for shift, multiplier in _MULTIPLIERS:
        state = (state ^ _shifted(state, shift)) * _signed(multiplier)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shift to the right without sign extension."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def scaled_rows(vector: Tensor, matrix: Tensor) -> Tensor:
    """Compute ``diag(v) M``: ``(n,)`` and ``(n, ...)`` -> ``(n, ...)``, differentiable in both."""
    rows: Tensor = _ScaledRows.apply(vector, matrix)  # type: ignore[no-untyped-call]
    return rows


class _ScaledRows(torch.autograd.Function):
    """Autograd function that allows several backward passes, since its inputs do not change."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, matrix: Tensor) -> Tensor:
        ctx.vector, ctx.matrix = vector, matrix
        return _column(vector, matrix) * matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        vector, matrix = ctx.vector.detach(), ctx.matrix.detach()
        needs_vector, needs_matrix = ctx.needs_input_grad
        return (
            (grad * matrix).flatten(1).sum(dim=1) if needs_vector else None,
            _column(vector, matrix) * grad if needs_matrix else None,
        )


def _column(vector: Tensor, matrix: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (matrix.ndim - 1))
