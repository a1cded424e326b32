"""Adapters of Z-Image in files, against Diffusers, PEFT and the formula of ComfyUI."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.stored import StoredAdapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS, TARGETS
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from tests.comfyui import by_name, comfyui, meant
from tests.z_image import write_z_image

Layers = dict[str, LayerWeights]
PROJECTIONS = ("to_q", "to_k", "to_v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    """Weights of the transformer's Linear layers by canonical name."""
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return {
        f"transformer.{key.removesuffix('.weight')}": weight
        for key, weight in stored.items()
        if key.endswith(".weight") and weight.ndim == 2
    }


@pytest.fixture(scope="module")
def layers_of(folder: Path, random_adapter: Callable[..., Layers]) -> Callable[..., Layers]:
    """Layers of a DoRA with magnitudes on an axis, or of a LoRA, on all Linear layers."""
    return lambda axis: random_adapter(folder, axis=axis, components=["transformer"])


def write(path: Path, layers: Layers, target: str = "diffusers") -> Path:
    return write_adapter(path, AdapterFile(layers, AdapterMetadata("z-image")), target)


def by_module(path: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of a ComfyUI file by Diffusers' path of the module."""
    files = by_name(load_file(path))
    assert all(name.startswith("diffusion_model.") for name in files)
    return {name.removeprefix("diffusion_model."): file for name, file in files.items()}


def errors_in_comfyui(
    path: Path, weights: dict[str, Tensor], layers: Layers, *, mended: bool = False
) -> list[float]:
    """Errors of weights patched with a file or with some in order, relative to their changes.

    ComfyUI's model joins to_q, to_k and to_v, one above the other, and patches each through a
    range of rows. The other layers have weights of their own.
    """
    parts = [by_module(file) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files, errors = parts[0], list[Tensor]()
    assert {f"transformer.{name}" for name in files} == layers.keys()

    def patched(weight: Tensor, name: str) -> Tensor:
        for part in parts:
            weight = comfyui(weight, part[name], mended=mended)
        return weight

    for block in {name.rpartition(".")[0] for name in files if name.endswith(PROJECTIONS)}:
        names = [f"transformer.{block}.{part}" for part in PROJECTIONS]
        joined = torch.cat([weights[name] for name in names]).double()
        before, size = joined.clone(), joined.shape[0] // 3
        for number, part in enumerate(PROJECTIONS):
            rows = joined.narrow(0, number * size, size)
            rows.copy_(patched(rows.clone(), f"{block}.{part}"))
        wanted = torch.cat([meant(weights[name], layers[name]) for name in names])
        errors.append((joined - wanted).norm() / (wanted - before).norm())
    for name in files:
        if not name.endswith(PROJECTIONS):
            weight = weights[f"transformer.{name}"].double()
            wanted = meant(weight, layers[f"transformer.{name}"])
            errors.append((patched(weight, name) - wanted).norm() / (wanted - weight).norm())
    return [error.item() for error in errors]


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = list(torch.randn(2, 4, 1, 8, 8, generator=generator))
    captions = [torch.randn(n, 32, generator=generator) for n in (5, 9)]
    (out,) = transformer(images, torch.tensor([0.1, 0.7]), captions, return_dict=False)
    return torch.stack(out)


@pytest.mark.parametrize("axis", ["output", None])
def test_diffusers_predicts_as_the_live_model(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers], axis: str | None
) -> None:
    from diffusers import ZImagePipeline

    file = write(tmp_path / "a.safetensors", layers_of(axis))
    pipeline = ZImagePipeline.from_pretrained(folder)
    base = predict(pipeline.transformer)
    live = predict(load_adapted(folder, file)[0].denoiser)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    loaded = predict(pipeline.transformer)
    assert (live - base).abs().max() > 0.1
    assert (loaded - live).abs().max() < 2e-5
    assert inspect_adapter(file, folder).tools["diffusers"] == "exact"


def test_peft_predicts_as_the_live_model(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers]
) -> None:
    from diffusers import ZImageTransformer2DModel
    from peft import PeftModel

    layers = layers_of("output")
    written = write(tmp_path / "peft", layers, "peft")
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    loaded = predict(PeftModel.from_pretrained(model, written / "transformer").base_model.model)
    file = write(tmp_path / "a.safetensors", layers)
    live = predict(load_adapted(folder, file)[0].denoiser)
    assert (loaded - live).abs().max() < 2e-5
    assert inspect_adapter(written).tools["PEFT"] == "exact"


@pytest.mark.parametrize(
    ("axis", "target"), [("output", "comfyui"), ("output", "dense"), ("input", "comfyui"),
                         ("input", "diffusion_model"), (None, "comfyui")],
)  # fmt: skip
def test_comfyui_computes_the_converted_file(
    tmp_path: Path,
    folder: Path,
    weights: dict[str, Tensor],
    layers_of: Callable[..., Layers],
    axis: str | None,
    target: str,
) -> None:
    layers = layers_of(axis)
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    base = folder if axis == "output" else None
    report = convert_adapter(source, tmp_path / "b.safetensors", target, base=base)
    # It adds an epsilon to norms, for which only compensated files allow.
    allowed = 5e-6 if axis == "input" else 1e-6
    assert max(errors_in_comfyui(report.path, weights, layers)) < allowed
    verdict = inspect_adapter(report.path).tools["ComfyUI and Forge"]
    assert verdict.startswith("exact for its base" if axis == "output" else "exact: in ComfyUI")
    assert inspect_adapter(report.path, folder).fits.startswith("yes, all 37 layers")


@pytest.mark.parametrize("mended", [False, True])
def test_two_files_are_exact_in_both_formulas(
    tmp_path: Path, weights: dict[str, Tensor], layers_of: Callable[..., Layers], mended: bool
) -> None:
    layers = layers_of("output")
    source = write(tmp_path / "a.safetensors", layers)
    path = convert_adapter(source, tmp_path / "b", "comfyui_pair").path
    assert max(errors_in_comfyui(path, weights, layers, mended=mended)) < 1e-6
    alone = sorted(path.iterdir())[1]
    assert inspect_adapter(alone).tools["ComfyUI and Forge"].startswith("exact: in ComfyUI with")


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("target", ["diffusers", "peft", "diffusion_model"])
def test_a_written_file_reads_as_the_same_adapter(
    tmp_path: Path,
    folder: Path,
    layers_of: Callable[..., Layers],
    assert_same_layers: Callable[..., None],
    axis: str | None,
    target: str,
) -> None:
    layers = layers_of(axis)
    if axis == "input" and target != "diffusion_model":
        with pytest.raises(AdapterFormatError, match="input axis"):
            write(tmp_path / "a", layers, target)
        return
    path = write(tmp_path / "a", layers, target)
    assert StoredAdapter.open(path).layout.name == target
    assert_same_layers(read_adapter(path).layers, layers)
    assert read_adapter(path).family == "z-image"


def original(path: str) -> str:
    """Path in the model's own code, except for joined projections."""
    for ours, theirs in (("to_out.0", "out"), ("all_x_embedder.2-1", "x_embedder"),
                         ("all_final_layer.2-1", "final_layer")):  # fmt: skip
        path = path.replace(ours, theirs)
    return path


# Names of a module in files of other programs.
NAMES: dict[str, Callable[[str], str]] = {
    "LyCORIS": lambda path: "lycoris_" + path.replace(".", "_"),
    "musubi-tuner": lambda path: "lora_unet_" + path.replace(".", "_"),
    "musubi-tuner, original": lambda path: "lora_unet_" + original(path).replace(".", "_"),
    "OneTrainer": lambda path: f"transformer.{path}",
    "original": lambda path: f"diffusion_model.{original(path)}",
    "bare": lambda path: path,
}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("program", NAMES)
def test_names_of_other_programs_are_read(
    tmp_path: Path,
    folder: Path,
    layers_of: Callable[..., Layers],
    assert_same_layers: Callable[..., None],
    program: str,
    with_base: bool,
) -> None:
    layers = layers_of("output")
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    tensors = {
        f"{NAMES[program](path)}.{leaf}": tensor
        for path, file in by_module(source).items()
        for leaf, tensor in file.items()
    }
    save_file(tensors, tmp_path / "b.safetensors")
    if with_base:
        with PipelineFolder.open(folder) as base:
            read = read_adapter(tmp_path / "b.safetensors", base)
    else:
        read = read_adapter(tmp_path / "b.safetensors")
    assert_same_layers(read.layers, layers)
    tools = inspect_adapter(tmp_path / "b.safetensors").tools
    assert tools["A1111"].startswith("no: ")


def test_formats_and_programs_without_transformers_are_refused(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers]
) -> None:
    source = write(tmp_path / "a.safetensors", layers_of("output"))
    for target in TARGETS:
        able = PROGRAMS.get(target) or CONVERSIONS[target]
        if "transformer" in able.denoisers:
            fit = FitSettings(rank=2) if target == "smaller-rank" else None
            report = convert_adapter(source, tmp_path / f"{target}-b", target, fit, base=folder)
            assert report.layers == len(layers_of("output"))
            continue
        with pytest.raises(AdapterFormatError, match="of a transformer is known") as error:
            convert_adapter(source, tmp_path / f"{target}-b", target, base=folder)
        assert "write one of diffusers, peft, diffusion_model, comfyui" in str(error.value)
    refused = {name for name, one in (*PROGRAMS.items(), *CONVERSIONS.items())
               if "transformer" not in one.denoisers}  # fmt: skip
    assert refused == {"kohya", "lora", "forge", "a1111", "invokeai", "sd-scripts", "civitai"}
    unet = {"unet.conv_in": LayerWeights(torch.ones(1, 4, 3, 3), torch.ones(8, 1, 1, 1), None, 1.0)}
    with pytest.raises(AdapterFormatError, match="no diffusion_model file of a UNet is known"):
        write(tmp_path / "u", unet, "diffusion_model")


# Key formats, their axis, and whether `inspect` calls them exact in Diffusers.
IN_DIFFUSERS = [("diffusers", "output", True), ("diffusers", None, True),
                ("diffusion_model", None, True), ("diffusion_model", "output", False),
                ("diffusion_model", "input", False), ("comfyui", "output", False)]  # fmt: skip


@pytest.mark.parametrize(("target", "axis", "is_exact"), IN_DIFFUSERS)
def test_a_verdict_on_diffusers_is_true(
    tmp_path: Path,
    folder: Path,
    layers_of: Callable[..., Layers],
    target: str,
    axis: str | None,
    is_exact: bool,
) -> None:
    """A file that is not exact there is loaded without magnitudes."""
    from diffusers import ZImagePipeline

    layers = layers_of(axis)
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    with PipelineFolder.open(folder) as base:
        adapter = AdapterFile(layers, AdapterMetadata("z-image"))
        file = write_adapter(tmp_path / "b.safetensors", adapter, target, base=base)
    verdict = inspect_adapter(file).tools["diffusers"]
    assert verdict.startswith("exact" if is_exact else "wrong: the magnitudes are ignored")
    plain = {name: dataclasses.replace(layer, magnitude=None) for name, layer in layers.items()}
    if not is_exact:
        source = write(tmp_path / "c.safetensors", plain, "diffusion_model")
    live = predict(load_adapted(folder, source)[0].denoiser)
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    assert (predict(pipeline.transformer) - live).abs().max() < 2e-5
