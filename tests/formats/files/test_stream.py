"""Safetensors written and read tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from dora_diffusion.formats.files import atomic as atomic_file
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.formats.files.stream import (
    TensorFileError,
    TensorReader,
    TensorSpec,
    save_tensors,
    write_tensors,
)
from tests.formats.adapter.helpers import ODD
from tests.properties import at_least, fresh

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


@at_least(200)
@given(
    index=st.one_of(
        ODD,
        st.dictionaries(
            st.sampled_from(["weight_map", "metadata"]),
            st.one_of(
                st.none(), st.integers(), st.lists(st.text(max_size=2)),
                st.dictionaries(
                    st.sampled_from(["a", "b", "c"]),
                    st.one_of(st.sampled_from(["s.safetensors", "../s", ""]), st.none(),
                              st.lists(st.integers(), max_size=1)),
                ),
            ),
        ).map(json.dumps),
    )
)  # fmt: skip
def test_no_strange_index_gets_past_the_reader_of_shards(
    index: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, fresh(folder / "s.safetensors"))
    path = fresh(folder / "s.safetensors.index.json")
    path.write_text(index, "utf-8")
    try:
        with TensorReader(path) as reader:
            loaded = {name: reader[name] for name in reader.specs}
    except TensorFileError:
        return
    assert loaded.keys() >= json.loads(index)["weight_map"].keys()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    with TensorReader(path) as reader:
        path.write_bytes(WHOLE[:-8])
        with pytest.raises(TensorFileError, match="truncated while it was read"):
            _ = [reader[name] for name in reader.specs]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "f32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "f16": torch.randn(2, 1, 3, generator=generator).half(),
        "transposed": torch.randn(4, 3, generator=generator).t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0),
        "int": torch.arange(6).view(1, 6),
        "bool": torch.tensor([True, False]),
        "f8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
    }


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", tensors(), {"b": "2", "ä": "ü"})
    loaded = load_file(path)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8) if name == "f8" else loaded[name],
                           tensor.view(torch.uint8) if name == "f8" else tensor)  # fmt: skip
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"b": "2", "ä": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_shards_read_as_one(tmp_path: Path) -> None:
    content = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.arange(4)}
    save_file({"a": content["a"]}, tmp_path / "m-1.safetensors")
    save_file({"b": content["b"], "c": content["c"]}, tmp_path / "m-2.safetensors")
    places = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    with TensorReader(index) as reader:
        assert all(torch.equal(reader[name], tensor) for name, tensor in content.items())
    variant = index.rename(tmp_path / "m.safetensors.index.fp16.json")
    with TensorReader(variant) as reader:
        assert reader.specs.keys() == content.keys()
    variant.rename(index)
    index.write_text(
        json.dumps({"weight_map": {**places, "d": "m-1.safetensors"}}), encoding="utf-8"
    )
    with pytest.raises(TensorFileError, match="in no shard: d"):
        TensorReader(index)
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(TensorFileError, match=r"missing shards: m-2\.safetensors"):
        TensorReader(index)
    index.write_text(json.dumps({"weight_map": {"a": "../m-1.safetensors"}}), encoding="utf-8")
    with pytest.raises(TensorFileError, match="outside its folder"):
        TensorReader(index)


def test_a_wrong_tensor_stops_the_write(tmp_path: Path) -> None:
    specs = {"x": TensorSpec(torch.float32, (2, 3))}
    with pytest.raises(TensorFileError, match=r"x: expected .*\(2, 3\), got .*\(3, 2\)"):
        write_tensors(tmp_path / "a.safetensors", specs, lambda _: torch.ones(3, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_stream, "_write_one", full)
    with pytest.raises(DiskFullError, match=r"the disk is full: a\.safetensors .* unchanged"):
        save_tensors(path, {"x": torch.zeros(2)})
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)  # delayed allocation: the disk fills up at the end
    with pytest.raises(DiskFullError):
        save_tensors(path, {"x": torch.zeros(2)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_large_file_is_synced_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_file, "_SYNCED_BYTES", 1000)
    tensors = {f"x{i:02}": torch.arange(97 * i, dtype=torch.float32) for i in range(40)}
    path = save_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_made_ahead_but_written_in_order(tmp_path: Path) -> None:
    """Whichever is made first, the file is the same; and memory holds only a few of them."""
    made, written, ahead = [], [], []

    def load(name: str) -> torch.Tensor:
        time.sleep(0.005 * (name in ("x00", "x07")))
        made.append(name)
        return torch.full((3,), float(name[1:]))

    def on_written(nbytes: int) -> None:
        written.append(nbytes)
        ahead.append(len(made) - len(written))

    names = [f"x{i:02}" for i in range(20)]
    specs = {name: TensorSpec(torch.float32, (3,)) for name in names}
    path = write_tensors(tmp_path / "a.safetensors", specs, load, on_written=on_written)
    assert written == [12] * 20
    assert max(ahead) <= 5
    loaded = load_file(path)
    assert [loaded[name].tolist() for name in names] == [[float(i)] * 3 for i in range(20)]
    assert torch.get_num_threads() == 1  # as conftest sets it
