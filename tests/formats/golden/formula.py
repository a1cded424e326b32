"""The numbers of golden files: exact in half precision, and computed without this package."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(label: str, shape: Sequence[int]) -> Tensor:
    """Multiples of 1/64 between -1 and 1, float32: the i-th is ((c + 37 i) mod 127 - 63) / 64.

    Args:
        label: What they are, such as ``unet.conv_in:down``; c is its CRC-32.
        shape: The tensor's.
    """
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((zlib.crc32(label.encode()) + 37 * index) % 127 - 63) / 64).reshape(*shape)


def factors(name: str, shape: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """``down (rank, in, *k)`` and ``up (out, rank, *1)`` of a layer's weight ``(out, in, *k)``."""
    out, into, *kernel = shape
    return (
        numbers(f"{name}:down", (rank, into, *kernel)),
        numbers(f"{name}:up", (out, rank, *[1] * len(kernel))),
    )


def magnitude(name: str, shape: Sequence[int], axis: str) -> Tensor:
    """The magnitudes of a layer, all positive."""
    return numbers(f"{name}:magnitude", (shape[0 if axis == "output" else 1],)).abs() + 1
