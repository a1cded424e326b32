"""Damaged files and interrupted exports: plain errors, and nothing lost."""

from __future__ import annotations

import json
import math
import os
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
from safetensors.torch import load_file, save, save_file

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.inspect import inspect_adapter
from dora_diffusion.formats.files.stream import TensorFileError, TensorReader, read_header
from dora_diffusion.merge import Strengths, merge_tensor
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


# DORA_DIFFUSION_FUZZ=20 tries twenty times as many.
MORE = int(os.environ.get("DORA_DIFFUSION_FUZZ", "1"))


@settings(max_examples=1500 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
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


BLOCK = "mid_block.attentions.0.transformer_blocks.0"
MODULES = ("attn1.to_q", "attn2.to_kv")
SHAPE = st.one_of(
    st.sampled_from([(2, 8), (6, 2), (6, 1), (1, 8), (6,), (8,), (), (0, 8), (6, 0), (2, 8, 1, 1)]),
    st.lists(st.sampled_from([0, 1, 2, 3, 6, 8]), max_size=5).map(tuple),
)
TENSOR = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    SHAPE,
    st.sampled_from(
        [torch.float32] * 4 + [torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
    ),
)
PARTS = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "magnitude",
    "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight",
)  # fmt: skip
KEY = st.builds(
    lambda kohya, module, part: (
        f"lora_unet_{BLOCK}_{module}".replace(".", "_") if kohya else f"unet.{BLOCK}.{module}"
    )
    + f".{part}",
    st.booleans(), st.sampled_from(MODULES), st.sampled_from(PARTS),
)  # fmt: skip
ODD = st.one_of(
    st.sampled_from(
        ["", "{", "[]", "{}", "null", "1e999", "nan", "-1", "²", "9" * 5000, "[" * 9999, "NaN"]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
            st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "(", "to_q", "a"]), inner,
            max_size=3,
        ),
        max_leaves=4,
    ).map(json.dumps),
)  # fmt: skip
FIELDS = (
    "lora_adapter_metadata", "ss_network_dim", "ss_network_alpha", "ss_tag_frequency",
    "ss_resolution", "modelspec.resolution", "dora_diffusion.rank", "dora_diffusion.norm_axis",
    "dora_diffusion.alpha", "dora_diffusion.unet_layers_per_block", "dora_diffusion.resolution",
)  # fmt: skip
MODEL = {
    f"unet.{BLOCK}.attn1.to_q": torch.ones(8, 8),
    f"unet.{BLOCK}.attn2.to_k": torch.ones(6, 8),
    f"unet.{BLOCK}.attn2.to_v": torch.ones(6, 8),
}


def read_or_refused(path: Path, with_model: bool) -> None:
    """What is read is whole; what is not is refused in our own words."""
    shapes = {name: tuple(weight.shape) for name, weight in MODEL.items()}
    known = {"module_shapes": shapes, "base_weight": MODEL.__getitem__} if with_model else {}
    try:
        adapter = read_adapter(path, **known)
        inspect_adapter(path)
    except AdapterFormatError:
        return
    for name, layer in adapter.layers.items():
        weight = torch.ones(layer.weight_shape)
        assert math.isfinite(layer.scale)
        assert not with_model or shapes[name] == layer.weight_shape
        assert layer.magnitude is None or merge_tensor(weight, [(layer, Strengths())]).numel()


@settings(max_examples=600 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    good=st.booleans(), tensors=st.dictionaries(KEY, TENSOR, max_size=4),
    fields=st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2), with_model=st.booleans(),
)  # fmt: skip
def test_no_strange_tensors_get_past_the_readers(
    good: bool, tensors: dict[str, torch.Tensor], fields: dict[str, str], with_model: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Any shapes, dtypes and metadata under names that are known, beside a good layer or alone."""
    path = tmp_path_factory.getbasetemp() / "strange.safetensors"
    whole = {
        f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 8),
        f"unet.{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file((whole if good else {}) | tensors, path, {"format": "pt", **fields})
    read_or_refused(path, with_model)


@settings(max_examples=200 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=st.one_of(
        ODD,
        st.dictionaries(
            st.sampled_from(["lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"]),
            st.one_of(ODD.map(str), st.integers(), st.dictionaries(st.text(max_size=3), ODD)),
        ).map(lambda values: json.dumps({"peft_type": "LORA", **values})),
    )
)
def test_no_strange_config_gets_past_the_reader_of_peft_folders(
    config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "unet"
    folder.mkdir(exist_ok=True)
    path = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {
        f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config, "utf-8")
    read_or_refused(folder, False)


@settings(max_examples=200 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
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
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "s.safetensors")
    path = folder / "s.safetensors.index.json"
    path.write_text(index, "utf-8")
    try:
        with TensorReader(path) as reader:
            loaded = {name: reader[name] for name in reader.specs}
    except TensorFileError:
        return
    assert loaded.keys() >= json.loads(index)["weight_map"].keys()


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({"lora_down.weight": torch.ones(2, 8, dtype=torch.int64)}, {}, "holds int64, not float"),
        ({"dora_scale": torch.ones(6, 1, dtype=torch.bool)}, {}, "holds bool, not float"),
        ({"alpha": torch.ones(3)}, {}, r"alpha has shape \(3,\)"),
        ({"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(6, 0)}, {}, "shape"),
        ({"lora_down.weight": torch.tensor(1.0)}, {}, r"factors of shapes \(\) and"),
        ({"lora_mid.weight": torch.ones(2, 3, 3, 3)}, {}, "its core .* does not fit"),
        ({"alpha": None}, {"ss_network_dim": "2", "ss_network_alpha": "inf"}, "its alpha is inf"),
        ({"alpha": None}, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}, "broken alpha"),
        ({"alpha": None}, {"lora_adapter_metadata": "[]"}, "is not a JSON object"),
    ],
)  # fmt: skip
def test_wrong_kinds_of_numbers_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], fields: dict[str, str], reason: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    tensors = load_file(path)
    for part, tensor in changes.items():
        tensors.pop(f"{PREFIX}.{part}", None)
        tensors |= {} if tensor is None else {f"{PREFIX}.{part}": tensor}
    save_file(tensors, path, {"format": "pt", **fields})
    with pytest.raises(AdapterFormatError, match=rf"^a\.safetensors: .*{reason}"):
        read_adapter(path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_adapters_of_a_changed_base_are_refused(tmp_path: Path, start: str) -> None:
    """PEFT subtracts them from the base's weights before it trains: they fit no released model."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": start}))
    with pytest.raises(AdapterFormatError, match=f"started by {start}, which changes the base's"):
        read_adapter(tmp_path)
    # diffusers keeps PEFT's config in the metadata of its file.
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start}
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(AdapterFormatError, match=f"started by {start}, which changes the base's"):
        read_adapter(file)


def test_whole_modules_beside_an_adapter_are_named(tmp_path: Path) -> None:
    """As PEFT itself saves them."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=r"whole trained modules .*'1'"):
        read_adapter(tmp_path)


def test_a_pickled_peft_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"would run code")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(tmp_path)


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


LIMITED = """
import resource, sys
from dora_diffusion.cli import main

base, adapter, *outputs = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for output in outputs:
    assert main(["export", "--overwrite", "--base", base, "--adapter", adapter,
                 "--output", output]) == 1
for target in ("dense", "peft", "diffusers"):
    assert main(["convert", adapter, outputs[0] + target, "--to", target, "--base", base]) == 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is one of Unix")
def test_files_that_may_grow_no_further(
    tmp_path: Path, sd1_folder: Path, random_adapter: Callable[..., Any]
) -> None:
    """The system itself stops the writing halfway, at 100 kB: the same as a disk that is full."""
    path = write_adapter(
        tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=3), AdapterMetadata("sd1"))
    )
    old = tmp_path / "old.safetensors"
    old.write_bytes(WHOLE)
    command = [sys.executable, "-c", LIMITED, str(sd1_folder), str(path), str(tmp_path / "new"),
               str(old)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 5
    assert all("would be larger than this disk or account allows" in line for line in lines)
    assert "error: old.safetensors would" in lines[1]
    assert lines[1].endswith("; the file that was there is unchanged")
    assert lines[4].endswith("; no file was left behind")
    assert old.read_bytes() == WHOLE
    assert {p.name for p in tmp_path.iterdir()} == {"a", "old.safetensors"}


def test_the_fuzzed_file_is_good_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    (layer,) = read_adapter(path).layers.values()
    assert (layer.norm_axis, layer.alpha) == ("output", 2.0)
    assert json.loads(WHOLE[8:HEADER_BYTES])["__metadata__"]["ss_network_dim"] == "2"
