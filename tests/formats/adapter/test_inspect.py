"""Kind and content of adapter files, and their fit to a base."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.export import convert_adapter, export_checkpoint, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from tests.formats.adapter.helpers import (
    MakeAdapter,
)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_inspect(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    layers = random_adapter(sd1_folder)
    facts = AdapterMetadata("sd1", "some/model", "sks dog", (512,))
    write_adapter(tmp_path, AdapterFile(layers, facts), target)
    report = inspect_adapter(tmp_path)
    assert report.key_format == target
    assert (report.method, report.norm_axis, report.rank) == ("DoRA", "output", "4")
    assert report.alpha == "3"  # as trained, although the diffusers file holds alpha = rank
    assert report.metadata.trigger == "sks dog"
    assert report.layers["unet"] + report.layers["text_encoder"] == len(layers)
    assert report.kinds["Conv2d 3x3"] > 10
    assert report.kinds["Conv2d 1x1"] > 10
    assert report.parameters == sum(
        t.numel() for layer in layers.values() for t in (layer.down, layer.up, layer.magnitude)
        if t is not None
    )  # fmt: skip
    assert 4 * report.parameters < report.nbytes < 5 * report.parameters
    assert report.notes


def test_a_model_is_no_adapter(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Whatever form it has; and not by hundreds of keys that are unknown."""
    with pytest.raises(AdapterFormatError, match="is a model, not an adapter"):
        read_adapter(sd1_folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(sd1_folder, target_is_directory=True)
    whole = "run contains a model whose weights were trained, not an adapter: give it as --base"
    with pytest.raises(AdapterFormatError, match=whole):
        read_adapter(tmp_path / "run")
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    single = export_checkpoint(sd1_folder, file, tmp_path / "m.safetensors")
    unet = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    text = sd1_folder / "text_encoder" / "model.safetensors"
    for path in (single, unet, text):
        with pytest.raises(AdapterFormatError, match=r": it is a model, not an adapter: .{9,300}$"):
            read_adapter(path)


def test_inspect_says_if_it_fits(
    tmp_path: Path, sd1_folder: Path, sdxl_folder: Path, adapter: AdapterFile
) -> None:
    path = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    report = inspect_adapter(path)
    assert report.fits == ""
    assert report.tools["LyCORIS"] == (
        'exact: with LycorisNetwork.LORA_PREFIX = "lora_unet", without which it finds no layer'
    )
    assert report.tools["A1111"].startswith("wrong")
    assert inspect_adapter(path, sd1_folder).fits == f"yes, all {len(adapter.layers)} layers"
    other = inspect_adapter(path, sdxl_folder)
    assert other.fits.startswith("no: ")
    assert other.layers == report.layers
    dense = convert_adapter(path, tmp_path / "d", "dense", base=sd1_folder).path
    report = inspect_adapter(dense, sd1_folder)
    assert report.fits.startswith(
        f"yes, all {len(adapter.layers)} layers by their names and shapes"
    )
    assert report.tools["ComfyUI and Forge"] == "exact for its base: wrong with any other"


@pytest.fixture
def dora(tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter) -> Path:
    """A DoRA of rank 4 and alpha 3."""
    layers = random_adapter(sd1_folder, every=9)
    return write_adapter(tmp_path / "dora", AdapterFile(layers, AdapterMetadata("sd1")))


@pytest.mark.parametrize("target", ["comfyui", "dense"])
def test_files_for_one_base_fit_by_their_shapes(
    tmp_path: Path, sd1_folder: Path, sd2_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    """SD1 and SD2 share all names of their UNets; the width of the prompt differs."""
    layers = random_adapter(sd1_folder, components=["unet"])
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    file = convert_adapter(source, tmp_path / "b", target, base=sd1_folder).path
    fits = inspect_adapter(file, sd1_folder).fits
    assert fits.startswith(f"yes, all {len(layers)} layers by their names and shapes")
    other = inspect_adapter(file, sd2_folder)
    assert other.fits.startswith("no: it was made for another model: unet.")
    assert "(32, 32) on (32, 64)" in other.fits or "1) on (" in other.fits
    assert other.kinds == inspect_adapter(file).kinds
    text = random_adapter(sd1_folder, components=["text_encoder"])
    for_text = write_adapter(tmp_path / "t", AdapterFile(text, AdapterMetadata("sd1")))
    file = convert_adapter(for_text, tmp_path / "c", target, base=sd1_folder).path
    tensors = {k.replace("layers_2_", "layers_9_"): t for k, t in load_file(file).items()}
    save_file(tensors, file, {"dora_diffusion.target": target})
    fits = inspect_adapter(file, sd1_folder).fits
    assert fits.startswith("no: the model has no module for lora_te_text_model_encoder_layers_9_")
