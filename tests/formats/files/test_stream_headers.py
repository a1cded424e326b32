"""Headers of safetensors files that lie."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from dora_diffusion.formats.files.stream import (
    TensorFileError,
    TensorReader,
    read_header,
    save_tensors,
)
from tests.properties import fresh


def with_header(header: str, data: bytes) -> bytes:
    raw = header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', bytes(4)),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(8)),
        ('{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        ("[" * 50_000, b""),
    ],
    ids=["twice", "overlap", "gap", "negative", "longer", "dtype", "shape", "nested"],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path: Path, header: str, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(header, data))
    with pytest.raises(TensorFileError, match=r"a\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 10**9, 101 * 10**6])
def test_an_oversized_header_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(TensorFileError, match="not a safetensors file, or is cut short"):
        read_header(path)
    path.write_bytes(b"")
    with pytest.raises(TensorFileError, match="cut short"):
        read_header(path)


def test_a_damaged_header_is_refused_in_plain_words(tmp_path: Path) -> None:
    """Whatever bytes are there, the error is ours, never one from inside a parser."""
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2, 3), "y": torch.ones(4)})
    whole, random = path.read_bytes(), Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(120)] = random.choice(b'0123456789[]{},":-.eFxy\x00\xff')
        fresh(path).write_bytes(damaged)
        try:
            with TensorReader(path) as reader:
                assert all(reader[name].shape == spec.shape for name, spec in reader.specs.items())
        except TensorFileError:
            refused += 1
    assert refused > 200
