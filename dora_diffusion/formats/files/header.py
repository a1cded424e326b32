"""The header of a safetensors file: names, dtypes, shapes and places of its tensors.

A safetensors file is 8 bytes of header length (little endian), a JSON header
``{name: {dtype, shape, data_offsets}}`` with optional string ``__metadata__``, and the raw bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Suffixes of files that can run code when they are opened, and never are.
PICKLED = (".ckpt", ".bin", ".pt", ".pth")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


class TensorFileError(ValueError):
    """A tensor file that cannot be read, or did not come out as intended."""


@dataclass(frozen=True)
class TensorSpec:
    """Header entry of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the raw data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Header:
    """The parsed header of a file.

    Attributes:
        specs: Its tensors, in the header's order.
        metadata: Its metadata.
        starts: Where each tensor's data begins, in bytes from the start of the file.
    """

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file without touching its tensors.

    Raises:
        TensorFileError: If the file is not a complete safetensors file: cut short or too long,
            a name twice, data that overlap or leave gaps.
        OSError: If it cannot be opened.
    """
    name = Path(path).name
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise TensorFileError(f"{name} is not a safetensors file, or is cut short")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
        notes = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        specs = {key: _parse_spec(item) for key, item in header.items()}
        places = {key: _parse_place(item) for key, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"{name} has a broken header: {error!r}") from error
    _check_places(name, specs, places, size - 8 - length)
    return Header(specs, notes, {key: 8 + length + start for key, (start, _) in places.items()})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a name appears twice")
    return items


def _parse_spec(item: dict[str, Any]) -> TensorSpec:
    shape = tuple(int(size) for size in item["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return TensorSpec(DTYPES[item["dtype"]], shape)


def _parse_place(item: dict[str, Any]) -> tuple[int, int]:
    start, stop = item["data_offsets"]
    return int(start), int(stop)


def _check_places(
    name: str,
    specs: Mapping[str, TensorSpec],
    places: Mapping[str, tuple[int, int]],
    data_bytes: int,
) -> None:
    end = 0
    for key, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end or stop - start != specs[key].nbytes:
            raise TensorFileError(f"{name} has a broken header: {key} is not where it should be")
        end = stop
    if end != data_bytes:
        raise TensorFileError(
            f"{name} is cut short: it holds {data_bytes} bytes of data, its header promises {end}"
        )
