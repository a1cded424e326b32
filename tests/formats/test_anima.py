"""Adapters of Anima in files, against Diffusers' converter and the formula of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import convert_adapter, export_checkpoint, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.names.kohya import kohya_name
from dora_diffusion.numerics.weights import LayerWeights
from tests.anima import diffusers_pipeline, write_anima
from tests.comfyui import by_name, comfyui, meant

Layers = dict[str, LayerWeights]
PREFIX = "net."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anima(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture(scope="module")
def original(folder: Path) -> dict[str, Tensor]:
    """Weights by their original names, without ``net.``."""
    file = export_checkpoint(folder, (), folder.parent / "original.safetensors")
    weights = load_file(file)
    assert all(name.startswith(PREFIX) for name in weights)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=["transformer", "both"])
def layers_of(
    request: pytest.FixtureRequest, folder: Path, random_adapter: Callable[..., Layers]
) -> Callable[..., Layers]:
    """Layers on all Linear layers of the transformer, or of the conditioner, too."""
    components = ["transformer", "text_conditioner"][: 1 if request.param == "transformer" else 2]

    def make(axis: str | None) -> Layers:
        layers = random_adapter(folder, axis=axis, components=components)
        return {name: layer for name, layer in layers.items() if not name.endswith(".embed")}

    return make


def diffusers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names of a file's weights, by Diffusers' converter."""
    start = "llm_adapter."
    own = {n: tensor for n, tensor in weights.items() if not n.startswith(start)}
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(own)
    inside = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    return {f"transformer.{name}": tensor for name, tensor in converted.items()} | {
        f"text_conditioner.{name}": tensor for name, tensor in inside.items()
    }


def stored(folder: Path) -> dict[str, Tensor]:
    """Weights of a pipeline's transformer and conditioner, by canonical name."""
    return {
        f"{part}.{name}": tensor
        for part in ("transformer", "text_conditioner")
        for name, tensor in load_file(folder / part / "diffusion_pytorch_model.safetensors").items()
    }


def write(path: Path, layers: Layers, target: str = "diffusers", **options: Any) -> Path:
    return write_adapter(path, AdapterFile(layers, AdapterMetadata("anima")), target, **options)


def patched(path: Path, weights: dict[str, Tensor], *, mended: bool = False) -> dict[str, Tensor]:
    """Weights by canonical names, of a model that ComfyUI patches with a file or some in order."""
    after = {name: weight.double() for name, weight in weights.items()}
    flat = {f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}": n for n in after}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for name, file in (item for one in files for item in by_name(load_file(one)).items()):
        key = flat.get(name) or f"{name.removeprefix('diffusion_model.')}.weight"
        assert name in flat or name.startswith("diffusion_model.")
        if "dora_scale" in file:
            assert file["dora_scale"].ndim == 2  # Otherwise ComfyUI skips layers.
        after[key] = comfyui(after[key], file, mended=mended)
    return diffusers_names(after)


def test_a_file_has_the_names_of_which_diffusers_makes_its_own(
    folder: Path, original: dict[str, Tensor]
) -> None:
    converted, wanted = diffusers_names(dict(original)), stored(folder)
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("axis", "target"), [("output", "comfyui"), ("output", "dense"), ("input", "dense"),
                         ("input", "comfyui"), ("input", "kohya"), (None, "comfyui"),
                         (None, "sd-scripts"), (None, "diffusion_model")],
)  # fmt: skip
def test_comfyui_computes_the_converted_file(
    tmp_path: Path,
    folder: Path,
    original: dict[str, Tensor],
    layers_of: Callable[..., Layers],
    axis: str | None,
    target: str,
) -> None:
    layers = layers_of(axis)
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    base = folder if axis == "output" or target == "dense" else None
    report = convert_adapter(source, tmp_path / "b.safetensors", target, base=base)
    merged = export_checkpoint(folder, source, tmp_path / "merged")
    exported, before = stored(merged), stored(folder)
    # ComfyUI adds an epsilon to norms, for which only compensated files allow.
    allowed = 5e-6 if axis == "input" and target != "dense" else 1e-6
    for name, weight in patched(report.path, original).items():
        if (key := name.removesuffix(".weight")) not in layers:
            assert torch.equal(weight.float(), before[name]), name
            continue
        wanted = meant(before[name], layers[key])
        change = (wanted - before[name]).norm()
        assert (weight - wanted).norm() / change < allowed, name
        assert (weight - exported[name]).norm() / change < allowed, name
    verdict = inspect_adapter(report.path).tools["ComfyUI and Forge"]
    assert verdict.startswith("exact for its base" if base else "exact: in ComfyUI"), verdict
    assert inspect_adapter(report.path, folder).fits.startswith(f"yes, all {len(layers)} layers")


@pytest.mark.parametrize("mended", [False, True])
def test_two_files_are_exact_in_both_formulas(
    tmp_path: Path, original: dict[str, Tensor], layers_of: Callable[..., Layers], mended: bool
) -> None:
    layers = layers_of("output")
    source = write(tmp_path / "a.safetensors", layers)
    report = convert_adapter(source, tmp_path / "b", "comfyui_pair")
    before = diffusers_names(dict(original))
    for name, weight in patched(report.path, original, mended=mended).items():
        if (key := name.removesuffix(".weight")) in layers:
            wanted = meant(before[name], layers[key])
            assert (weight - wanted).norm() / (wanted - before[name]).norm() < 1e-6, name


def test_sd_scripts_gets_a_plain_lora_with_its_names(
    tmp_path: Path, folder: Path, original: dict[str, Tensor], layers_of: Callable[..., Layers]
) -> None:
    """Its module is called after the original path; its scale is alpha over the rank."""
    layers = layers_of("output")
    source = write(tmp_path / "a.safetensors", layers)
    report = convert_adapter(source, tmp_path / "b.safetensors", "sd-scripts", base=folder)
    modules = {f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}": n for n in original}
    file, before = by_name(load_file(report.path)), diffusers_names(dict(original))
    assert file.keys() <= modules.keys()
    after = dict(original)
    for name, part in file.items():
        assert part.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
        scale = part["alpha"] / part["lora_down.weight"].shape[0]
        after[modules[name]] = original[modules[name]] + scale * (
            part["lora_up.weight"] @ part["lora_down.weight"]
        )
    errors = dict(report.errors)
    for name, weight in diffusers_names(after).items():
        if (key := name.removesuffix(".weight")) in layers:
            wanted = meant(before[name], layers[key])
            error = float((weight - wanted).norm() / (wanted - before[name]).norm())
            assert error == pytest.approx(errors[key], abs=1e-3)
    tools = inspect_adapter(report.path).tools
    assert tools["sd-scripts"] == "exact: by the names in its source"
    assert tools["diffusers"].startswith("wrong: it finds none")


def test_every_module_of_the_released_classes_has_a_name() -> None:
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    with torch.device("meta"):
        models = {
            "transformer": CosmosTransformer3DModel(
                num_attention_heads=16, rope_scale=(1, 4, 4), extra_pos_embed_type=None
            ),
            "text_conditioner": AnimaTextConditioner(),
        }
    linear = [
        f"{part}.{name}"
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    names = {name: kohya_name(name, FAMILIES["anima"]) for name in linear}
    assert None not in names.values()
    assert len(set(names.values())) == len(linear) == 28 * 16 + 6 + 6 * 10 + 1
    sources = {
        f"{path.removeprefix('diffusion_model.')}.weight": torch.full((1,), float(number))
        for number, path in enumerate(names.values())
        if path and not path.startswith("diffusion_model.llm_adapter.")
    }
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(dict(sources))
    for key, tensor in converted.items():
        assert list(names)[int(tensor)] == f"transformer.{key.removesuffix('.weight')}"
    for name, path in names.items():
        if name.startswith("text_conditioner."):
            own = name.removeprefix("text_conditioner.")
            assert path == f"diffusion_model.llm_adapter.{own}"


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "lycoris_", "net."])
@pytest.mark.parametrize("with_base", [False, True])
def test_names_of_other_programs_are_read(
    tmp_path: Path,
    folder: Path,
    layers_of: Callable[..., Layers],
    original: dict[str, Tensor],
    assert_same_layers: Callable[..., None],
    axis: str | None,
    prefix: str,
    with_base: bool,
) -> None:
    """Original names, with dots or underscores."""
    layers = layers_of(axis)
    source = write(tmp_path / "a.safetensors", layers, "kohya")
    flat = {
        n.removesuffix(".weight").replace(".", "_"): n.removesuffix(".weight") for n in original
    }
    tensors = {}
    for name, file in by_name(load_file(source)).items():
        module = name.removeprefix("lora_unet_")
        module = flat[module] if prefix.endswith(".") else module
        if prefix == "lycoris_" and module.startswith("llm_adapter"):
            continue  # LyCORIS' wrapper was not seen on the conditioner.
        tensors |= {f"{prefix}{module}.{suffix}": tensor for suffix, tensor in file.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    with PipelineFolder.open(folder) as base:
        read = read_adapter(tmp_path / "b.safetensors", base if with_base else None)
    if prefix == "lycoris_":
        layers = {name: w for name, w in layers.items() if name.startswith("transformer.")}
    assert_same_layers(read.layers, layers)


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_verdicts_on_diffusers_are_true(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers], axis: str | None
) -> None:
    layers = layers_of(axis)
    targets = ["diffusion_model", "kohya", *(["diffusers"] if axis != "input" else [])]
    for target in targets:
        file = write(tmp_path / f"{target}.safetensors", layers, target)
        pipeline = diffusers_pipeline(folder)
        verdict = inspect_adapter(file).tools["diffusers"]
        if verdict.startswith("convert: it refuses"):
            with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
                pipeline.load_lora_weights(tmp_path, weight_name=file.name)
            continue
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        parts = (pipeline.transformer, pipeline.text_conditioner)
        changed = [n for part in parts for n, _ in part.named_modules() if "lora_A" in n]
        assert verdict.startswith("exact") == (target == "diffusers"), verdict
        assert verdict.startswith("wrong: it finds none") == (not changed), (target, verdict)


def test_diffusers_names_are_unknown_to_comfyui(
    tmp_path: Path, layers_of: Callable[..., Layers]
) -> None:
    layers = layers_of(None)
    tools = inspect_adapter(write(tmp_path / "a.safetensors", layers)).tools
    assert tools["ComfyUI and Forge"].startswith("wrong: it leaves")
