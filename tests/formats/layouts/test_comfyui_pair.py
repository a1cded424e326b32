"""Two files for ComfyUI, by its formula and by the one that may replace it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.formats.names.kohya import kohya_name
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.comfyui import by_name
from tests.formats.layouts.helpers import MakeAdapter, weights_of

Layers = dict[str, LayerWeights]


def patch(weight: Tensor, file: dict[str, Tensor], *, mended: bool) -> Tensor:
    """ComfyUI's patch of a weight in float32: 0.3.64, or as its pull request 15458 changes it."""
    up, down = file["lora_up.weight"], file["lora_down.weight"]
    changed = weight + file["alpha"] / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    if (scale := file.get("dora_scale")) is None:
        return changed
    if scale.shape[0] == len(weight):
        norm = (changed if mended else weight).flatten(1).norm(dim=1).view_as(scale)
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).view_as(scale)
    return changed * (scale / (norm + torch.finfo(torch.float32).eps))


def mixed(layers: Layers, other: dict[str, LayerWeights]) -> dict[str, LayerWeights]:
    """A third of the layers each: on the output axis, on the input axis, and a LoRA."""
    found = {}
    for number, (name, layer) in enumerate(layers.items()):
        plain = dataclasses.replace(layer, magnitude=None)
        found[name] = (layer, other[name], plain)[number % 3]
    return found


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_both_formulas_compute_the_merge_on_any_base(
    tmp_path: Path,
    sd1_folder: Path,
    sdxl_folder: Path,
    random_adapter: MakeAdapter,
    family: str,
    is_mixed: bool,
    mended: bool,
) -> None:
    folder = {"sd1": sd1_folder, "sdxl": sdxl_folder}[family]
    layers = random_adapter(folder, axis="output", every=3)
    if is_mixed:
        layers = mixed(layers, random_adapter(folder, axis="input", every=3))
    assert {layer.up.ndim for layer in layers.values()} == {2, 4}
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata(family)), "kohya")
    report = convert_adapter(source, tmp_path / "dog.v2", "comfyui_pair")
    assert (report.target, report.errors, report.layers) == ("comfyui_pair", {}, len(layers))
    files = sorted(report.path.iterdir())
    assert [file.name for file in files] == [
        "dog.v2_1_lora.safetensors", "dog.v2_2_magnitudes.safetensors"
    ]  # fmt: skip
    first, second = (by_name(load_file(file)) for file in files)
    assert len(first) == len(layers)
    assert len(second) == sum(layer.magnitude is not None for layer in layers.values())
    for name, layer in layers.items():
        key = kohya_name(name, FAMILIES[family])
        assert key is not None
        for factor in (1.0, 1.7):  # A base that nobody trained on.
            weight = weights_of(folder)[f"{name}.weight"] * factor
            found = patch(weight, first[key], mended=mended)
            if key in second:
                found = patch(found, second[key], mended=mended)
            wanted = merge_tensor(weight, [(layer, Strengths())])
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * factor, msg=name)


def pair(folder: Path, layers: Layers, **options: torch.dtype) -> Path:
    adapter = AdapterFile(layers, AdapterMetadata("sd1", trigger="sks dog"))
    return write_adapter(folder, adapter, "comfyui_pair", **options)


def test_neither_file_is_read_as_an_adapter(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis="output", every=6)
    folder = pair(tmp_path / "dog", layers)
    for path in (folder, *folder.iterdir()):
        with pytest.raises(AdapterFormatError, match="one of two files"):
            read_adapter(path)
        report = inspect_adapter(path, sd1_folder)
        assert report.method == "DoRA"
        assert report.norm_axis == "output"
        assert report.metadata.trigger == "sks dog"
        assert sum(report.layers.values()) == len(layers)
        assert report.fits == f"yes, all {len(layers)} layers by their names and shapes"
        assert [note.partition(":")[0] for note in report.notes] == ["one of two files"]
        verdicts = {name: text.partition(":")[0] for name, text in report.tools.items()}
        assert verdicts.pop("ComfyUI and Forge") == "exact"
        assert verdicts.pop("diffusers") == "wrong"
        assert {*verdicts.values()} == {"convert"}


def test_the_second_file_is_small_and_exact(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis="output", every=6)
    first, second = (load_file(file) for file in sorted(pair(tmp_path / "a", layers).iterdir()))
    half = [load_file(file) for file in sorted(pair(tmp_path / "b", layers, dtype=torch.float16)
                                               .iterdir())]  # fmt: skip
    assert {t.dtype for key, t in half[0].items() if key.endswith("weight")} == {torch.float16}
    for part in (second, half[1]):
        for name, layer in layers.items():
            file = by_name(part)[str(kohya_name(name, FAMILIES["sd1"]))]
            assert file["lora_down.weight"].shape == (1, *layer.down.shape[1:])
            assert not file["lora_down.weight"].any()
            assert not file["lora_up.weight"].any()
            assert file["lora_up.weight"].dtype == torch.float16
            assert torch.equal(file["dora_scale"].flatten(), layer.magnitude)
    assert not any("dora_scale" in key for key in first)


@pytest.mark.parametrize("axis", ["input", None])
def test_one_file_is_enough_without_magnitudes_on_the_output_axis(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str | None
) -> None:
    layers = random_adapter(sd1_folder, axis=axis, every=6)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "dog", "comfyui_pair")
    assert report.target == "kohya"
    [file] = report.path.iterdir()
    assert file.name == "dog.safetensors"
    written, wanted = load_file(file), load_file(source)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in written.items())
    assert read_header(file).metadata["dora_diffusion.target"] == "kohya"


def test_a_folder_written_again_holds_the_new_files_alone(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    pair(tmp_path / "dog", random_adapter(sd1_folder, axis="output", every=6))
    pair(tmp_path / "dog", random_adapter(sd1_folder, axis="input", every=6))
    assert [file.name for file in (tmp_path / "dog").iterdir()] == ["dog.safetensors"]
    with pytest.raises(AdapterFormatError, match=r"leave \.safetensors out of dog\.safetensors"):
        pair(tmp_path / "dog.safetensors", random_adapter(sd1_folder, axis="output", every=6))
