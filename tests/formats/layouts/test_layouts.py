"""The list of layouts: each reads what it writes, and no two take one file for theirs."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats import layouts
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.stored import StoredAdapter
from dora_diffusion.formats.files import stream
from dora_diffusion.formats.layouts import COLUMNS, LAYOUTS, Conversion
from dora_diffusion.formats.layouts.layout import (
    AdapterLayout,
    EncodedFile,
    Key,
    Layers,
    WriteOptions,
    all_layouts,
    layout_named,
    layout_of,
)
from dora_diffusion.formats.layouts.one_base import WriteOnly
from dora_diffusion.formats.names.kohya import name_resolver
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import BLOCK, MODEL, MakeAdapter, SameLayers, saved

GOLDEN = Path(__file__).parent.parent / "golden"
TO_Q = f"unet.{BLOCK}.attn1.to_q"


def layer(axis: str | None) -> LayerWeights:
    magnitude = torch.rand(8) + 1 if axis else None
    return LayerWeights(
        torch.randn(2, 8), torch.randn(8, 2), magnitude, 2.0,
        "input" if axis == "input" else "output",
    )  # fmt: skip


def encoded(name: str, axis: str | None) -> list[tuple[set[str], Mapping[str, str]]]:
    """Keys and metadata of the files that a layout writes of one layer."""
    layout, layers = layout_named(name), {TO_Q: layer(axis)}
    layout.check(layers)
    files = layout.encode(layers, WriteOptions(AdapterMetadata("sd1"), base=MODEL))
    return [(set(file.tensors), file.metadata) for file in files.values() if file.text is None]


WRITTEN = [(name, axis) for name, conversion in LAYOUTS.items()
           if conversion and "unet" in conversion.denoisers for axis in (None, "output", "input")
           if not (name in ("diffusers", "peft") and axis == "input")]  # fmt: skip
# Of what is read only, or holds no UNet, the keys that its program writes.
READ_ONLY = {
    "attn_procs": {f"{BLOCK}.attn1.processor.to_q_lora.{side}.weight" for side in ("down", "up")},
    "diffusion_model": {f"diffusion_model.layers.0.attention.to_q.{leaf}"
                        for leaf in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")},
    "onetrainer": {f"unet.middle_block.1.transformer_blocks.0.attn1.to_q.{leaf}"
                   for leaf in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")},
    "lokr": {f"{TO_Q}.{leaf}" for leaf in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")},
    "vera": {f"{TO_Q}.vera_lambda_{part}" for part in "db"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "axis"), WRITTEN)
def test_a_layout_reads_what_it_writes(name: str, axis: str | None) -> None:
    *_, (keys, metadata) = encoded(name, axis)
    layout = layout_named(name)
    told = layout_of(keys, metadata)
    # On the input axis, and without magnitudes, ComfyUI computes a plain kohya file.
    is_plain = name in ("comfyui", "comfyui_pair") and axis != "output"
    assert told.name == ("kohya" if is_plain else name)
    if name == "dense":
        return
    for text in keys:
        key = layout.parse(text)
        assert key is not None
        assert key.path + key.form == text
        assert layout.owns(key)
        assert layout.module(key, name_resolver(), "unet") == TO_Q


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_two_layouts_claim_a_file(name: str) -> None:
    files = [file for n, axis in WRITTEN if n == name for file in encoded(n, axis)]
    files += [(READ_ONLY[name], {"dora_diffusion.target": name})] if name in READ_ONLY else []
    assert files
    for keys, metadata in files:
        claims = [layout.name for layout in all_layouts() if layout.matches(keys, metadata)]
        assert len(claims) == 1
        assert claims == [name] or (name[:7], claims) == ("comfyui", ["kohya"])


FILES = [path.parent / name for path in sorted(GOLDEN.glob("*/description.json"))
         for name in json.loads(path.read_text(encoding="utf-8"))["files"]]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_inspect_and_the_reader_see_one_layout(path: Path) -> None:
    stored, report = StoredAdapter.open(path), inspect_adapter(path)
    assert report.key_format == stored.layout.key_format != "other"
    assert stored.layout.name == path.name.partition("-")[0]
    if isinstance(stored.layout, WriteOnly):
        with pytest.raises(AdapterFormatError):
            read_adapter(path)
    else:
        assert sum(report.layers.values()) == len(read_adapter(path).layers)


def test_each_header_is_read_once(
    tmp_path: Path, sd1_folder: Path, sd2_folder: Path, random_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also of an adapter that does not fit, which is read a second time without the base."""
    layers = random_adapter(sd1_folder)
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "peft")
    read, opened = stream.read_header, []

    def counted(file: Path) -> object:
        opened.append(Path(file))
        return read(file)

    monkeypatch.setattr(stream, "read_header", counted)
    assert inspect_adapter(path, sd2_folder).fits.startswith("no: ")
    own = [file for file in opened if path in file.parents]
    assert sorted(own) == sorted(path.rglob("*.safetensors"))


class Shouted(AdapterLayout):
    """``CONV_IN!down``: as an example in the documents has it."""

    name = key_format = "shouted"
    file_name = "shouted.safetensors"

    def parse(self, key: str) -> Key | None:
        path, mark, part = key.partition("!")
        parts = {"down": "down", "up": "up", "alpha": "alpha"}
        return Key(key, path, mark + part, parts[part]) if part in parts else None

    def module(self, key: Key, resolve: object, component: str | None) -> str | None:
        return key.path.lower()

    def check(self, layers: Layers) -> None:
        if any(layer.magnitude is not None for layer in layers.values()):
            raise AdapterFormatError("the shouted format holds no magnitudes; write diffusers")

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        tensors: dict[str, Tensor] = {}
        for name, part in layers.items():
            values = {"down": part.down, "up": part.up, "alpha": torch.tensor(part.alpha)}
            tensors |= {f"{name.upper()}!{key}": tensor for key, tensor in values.items()}
        return {self.file_name: EncodedFile.of(tensors, {})}

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(COLUMNS, "convert: nobody shouts")


def test_a_layout_is_one_module_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_layers: SameLayers
) -> None:
    """Read, inspected, and written through the functions that everybody uses."""
    monkeypatch.setitem(sys.modules, f"{layouts.__name__}.shouted",
                        SimpleNamespace(SHOUTED=Shouted()))  # fmt: skip
    monkeypatch.setitem(LAYOUTS, "shouted", Conversion("nowhere", "in capitals"))
    wanted = {TO_Q: layer(None), f"unet.{BLOCK}.attn2.to_k": layer(None)}
    path = write_adapter(tmp_path, AdapterFile(wanted), "shouted")
    assert path.name == "shouted.safetensors"
    assert_same_layers(read_adapter(path).layers, wanted)
    report = inspect_adapter(path)
    assert (report.key_format, report.layers) == ("shouted", {"unet": 2})
    assert report.tools["diffusers"] == "convert: nobody shouts"
    with pytest.raises(AdapterFormatError, match="holds no magnitudes"):
        write_adapter(tmp_path, AdapterFile({TO_Q: layer("output")}), "shouted")
    strange = saved(tmp_path, {f"{TO_Q.upper()}!sideways": torch.ones(2, 2)})
    with pytest.raises(AdapterFormatError, match="1 keys belong to no known module"):
        read_adapter(strange)


def test_the_example_in_the_documents_is_the_one_that_runs() -> None:
    file = Path(__file__).parents[3] / "docs" / "contributing" / "adapter-formats.md"
    text = file.read_text(encoding="utf-8")
    for method in (Shouted.parse, Shouted.module):
        assert inspect.getsource(method) in text
    body = inspect.getsource(Shouted.encode).partition("tensors |=")[2]
    assert body in text
    line = '"shouted": {"summary": "nowhere", "written": "in capitals"}'
    assert line in text
    assert Conversion(**json.loads(f"{{{line}}}")["shouted"]) == Conversion(
        "nowhere", "in capitals"
    )
