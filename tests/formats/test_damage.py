"""Damaged files and interrupted exports: plain errors, and nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dora_diffusion.formats.adapter_file import (
    AdapterFile,
    AdapterFormatError,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.safetensors_stream import TensorFileError, TensorReader, read_header
from dora_diffusion.numerics.weights import LayerWeights

PREFIX = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WHOLE = save(
    {
        f"{PREFIX}.lora_down.weight": torch.ones(2, 8),
        f"{PREFIX}.lora_up.weight": torch.ones(6, 2),
        f"{PREFIX}.alpha": torch.tensor(2.0),
        f"{PREFIX}.dora_scale": torch.ones(6, 1),
    },
    {"ss_network_dim": "2", "ss_network_alpha": "1", "dora_diffusion.rank": "2"},
)
HEADER_BYTES = 8 + int.from_bytes(WHOLE[:8], "little")
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert"]),
        # Most of them in the header, where they matter.
        st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, len(WHOLE) - 1)),
        st.one_of(
            st.binary(min_size=1, max_size=8), st.sampled_from([b'"', b"{", b"[", b"9", b"-"])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(edits: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(WHOLE)
    for kind, place, content in edits:
        end = place + (len(content) if kind != "insert" else 0)
        data[place:end] = b"" if kind == "cut" else content
    return bytes(data)


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(edits=EDITS)
def test_no_damage_gets_past_the_readers(
    edits: list[tuple[str, int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read, or refused in our own words: never an error from inside a library."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(mutated(edits))
    try:
        layers = read_adapter(path).layers
    except AdapterFormatError:
        return
    for layer in layers.values():
        assert isinstance(layer, LayerWeights)
        assert torch.isfinite(layer.down).all()


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


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    with TensorReader(path) as reader:
        path.write_bytes(WHOLE[:-8])
        with pytest.raises(TensorFileError, match="cut short while it was read"):
            _ = [reader[name] for name in reader.specs]


KILLED = """
import os, signal, sys
from dora_diffusion.export import export_checkpoint

def kill_halfway(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

base, adapter, output = sys.argv[1:]
export_checkpoint(base, adapter, output, overwrite=True, on_progress=kill_halfway)
"""


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_killed_export_leaves_the_old_one(
    tmp_path: Path, sd1_folder: Path, random_adapter: Callable[..., Any], name: str
) -> None:
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=9)))
    output = tmp_path / name
    if name == "merged":
        output.mkdir()
        (output / "model_index.json").write_text("{}")
    else:
        output.write_bytes(WHOLE)

    def contents() -> dict[str, bytes]:
        files = [output] if output.is_file() else sorted(output.rglob("*"))
        return {file.name: file.read_bytes() for file in files}

    before = contents()
    command = [sys.executable, "-c", KILLED, str(sd1_folder), str(path), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert contents() == before
    left = {p.name for p in tmp_path.iterdir()} - {"a", name}
    assert all(file.startswith(".") and file.endswith(".tmp") for file in left), left


def test_the_fuzzed_file_is_good_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    (layer,) = read_adapter(path).layers.values()
    assert (layer.norm_axis, layer.alpha) == ("output", 2.0)
    assert json.loads(WHOLE[8:HEADER_BYTES])["__metadata__"]["ss_network_dim"] == "2"
