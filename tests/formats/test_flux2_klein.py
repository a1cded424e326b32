"""Adapters of FLUX.2-klein in files, against Diffusers' converter and the formula of ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from tests.comfyui import by_name, comfyui, meant
from tests.flux2_klein import write_flux2_klein

Layers = dict[str, LayerWeights]
# Names of Diffusers that ComfyUI reads as parts of a joined matrix.
PARTS = {"to_q": ("img", 0), "to_k": ("img", 1), "to_v": ("img", 2), "add_q_proj": ("txt", 0),
         "add_k_proj": ("txt", 1), "add_v_proj": ("txt", 2)}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["4B", "9B"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2_klein(tmp_path_factory.mktemp("klein") / "model", is_9b=request.param)


@pytest.fixture(scope="module")
def original(folder: Path) -> dict[str, Tensor]:
    """Weights by their original names, of which Diffusers' converter makes the folder's."""
    file = export_checkpoint(folder, (), folder.parent / "original.safetensors")
    weights = load_file(file)
    wanted = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(weights))
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in wanted.items())
    return weights


@pytest.fixture(scope="module")
def layers_of(folder: Path, random_adapter: Callable[..., Layers]) -> Callable[..., Layers]:
    """Layers of a DoRA with magnitudes on an axis, or of a LoRA, on all Linear layers."""
    return lambda axis: random_adapter(folder, axis=axis, components=["transformer"])


def write(path: Path, layers: Layers, target: str = "diffusers", **options: Any) -> Path:
    adapter = AdapterFile(layers, AdapterMetadata("flux2-klein"))
    return write_adapter(path, adapter, target, **options)


def patched(path: Path, weights: dict[str, Tensor], *, mended: bool = False) -> dict[str, Tensor]:
    """Weights by Diffusers' names, of a model that ComfyUI patches with a file or some in order."""
    after = {name: weight.double() for name, weight in weights.items()}
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for name, file in (item for one in files for item in by_name(load_file(one)).items()):
        prefix, _, module = name.partition(".")
        if prefix == "diffusion_model":
            rows = after[f"{module}.weight"]
        else:
            assert prefix == "transformer"
            block, leaf = re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(\w+)", module).groups()
            kind, number = PARTS[leaf]
            joined = after[f"double_blocks.{block}.{kind}_attn.qkv.weight"]
            rows = joined.chunk(3)[number]
        rows.copy_(comfyui(rows.clone(), file, mended=mended))
    return convert_flux2_transformer_checkpoint_to_diffusers(after)


@pytest.mark.parametrize(
    ("axis", "target"), [("output", "comfyui"), ("output", "dense"), ("input", "dense"),
                         ("input", "comfyui"), ("input", "diffusion_model"), (None, "comfyui"),
                         (None, "diffusion_model")],
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
    exported = load_file(merged / "transformer" / "diffusion_pytorch_model.safetensors")
    before = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    # ComfyUI adds an epsilon to norms, for which only compensated files allow.
    allowed = 5e-6 if axis == "input" and target != "dense" else 1e-6
    for name, weight in patched(report.path, original).items():
        if (key := f"transformer.{name.removesuffix('.weight')}") not in layers:
            assert torch.equal(weight.float(), before[name]), name
            continue
        wanted = meant(before[name], layers[key])
        change = (wanted - before[name]).norm()
        assert (weight - wanted).norm() / change < allowed, name
        assert (weight - exported[name]).norm() / change < allowed, name
    verdict = inspect_adapter(report.path).tools["ComfyUI and Forge"]
    assert verdict.startswith("exact for its base" if base else "exact: in ComfyUI")
    assert inspect_adapter(report.path, folder).fits.startswith(f"yes, all {len(layers)} layers")


@pytest.mark.parametrize("mended", [False, True])
def test_two_files_are_exact_in_both_formulas(
    tmp_path: Path,
    folder: Path,
    original: dict[str, Tensor],
    layers_of: Callable[..., Layers],
    mended: bool,
) -> None:
    layers = layers_of("output")
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    report = convert_adapter(source, tmp_path / "b", "comfyui_pair")
    before = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    for name, weight in patched(report.path, original, mended=mended).items():
        if (key := f"transformer.{name.removesuffix('.weight')}") in layers:
            wanted = meant(before[name], layers[key])
            assert (weight - wanted).norm() / (wanted - before[name]).norm() < 1e-6, name
        else:
            assert torch.equal(weight.float(), before[name]), name
    assert inspect_adapter(report.path).tools["ComfyUI and Forge"].startswith("exact: in ComfyUI")
    assert inspect_adapter(report.path, folder).fits.startswith(f"yes, all {len(layers)} layers")


@pytest.mark.parametrize("size", ["4B", "9B", "dev"])
def test_every_module_of_the_released_class_has_a_name(size: str) -> None:
    """The names are those of which Diffusers' converter makes the model's, each used once."""
    from diffusers import Flux2Transformer2DModel

    from dora_diffusion.config.families import FAMILIES

    blocks = {"4B": (5, 20), "9B": (8, 24), "dev": (8, 48)}[size]
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            num_layers=blocks[0], num_single_layers=blocks[1], attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=24, axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=size == "dev",
        )  # fmt: skip
    linear = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = {n: kohya_name(f"transformer.{n}", FAMILIES["flux2-klein"]) for n in linear}
    assert None not in names.values()
    assert len(set(names.values())) == len(linear)
    sources = {f"{name.removeprefix('diffusion_model.')}.weight": torch.full((6, 1), float(number))
               for number, name in enumerate(names.values())
               if name.startswith("diffusion_model.")}  # fmt: skip
    converted = convert_flux2_transformer_checkpoint_to_diffusers(sources)
    whole = [n for n in linear if n.rpartition(".")[2] not in PARTS]
    assert converted.keys() == {f"{name}.weight" for name in whole}
    for name in whole:
        assert converted[f"{name}.weight"].unique().item() == list(names).index(name)
    parts = {n for n in linear if n.rpartition(".")[2] in PARTS}
    assert {names[name] for name in parts} == {f"transformer.{name}" for name in parts}


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "lycoris_", "transformer."])
@pytest.mark.parametrize("with_base", [False, True])
def test_names_of_other_programs_are_read(
    tmp_path: Path,
    folder: Path,
    layers_of: Callable[..., Layers],
    assert_same_layers: Callable[..., None],
    axis: str | None,
    prefix: str,
    with_base: bool,
) -> None:
    """Original names, or those of Diffusers, with dots or underscores."""
    layers = layers_of(axis)
    source = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    tensors = {}
    for name, file in by_name(load_file(source)).items():
        start, _, module = name.partition(".")
        if (prefix == "transformer.") != (start == "transformer"):
            continue
        module = module if prefix.endswith(".") else module.replace(".", "_")
        tensors |= {f"{prefix}{module}.{suffix}": tensor for suffix, tensor in file.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    with PipelineFolder.open(folder) as base:
        read = read_adapter(tmp_path / "b.safetensors", base if with_base else None)
    is_part = {name: name.rpartition(".")[2] in PARTS for name in layers}
    kept = {n: layer for n, layer in layers.items() if is_part[n] == (prefix == "transformer.")}
    assert_same_layers(read.layers, kept)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_joined_matrices_of_ai_toolkit_are_split(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers], prefix: str
) -> None:
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    width = weights["transformer_blocks.0.attn.to_q.weight"].shape[0]
    tensors, ups = {}, {}
    for kind in ("img", "txt"):
        name = f"double_blocks.0.{kind}_attn.qkv"
        name = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        forms = ("lora_A", "lora_B") if prefix.endswith(".") else ("lora_down", "lora_up")
        ups[kind] = torch.randn(3 * width, 4)
        tensors[f"{name}.{forms[0]}.weight"] = torch.randn(4, width)
        tensors[f"{name}.{forms[1]}.weight"] = ups[kind]
    save_file(tensors, tmp_path / "a.safetensors")
    with PipelineFolder.open(folder) as base:
        for model in (None, base):
            layers = read_adapter(tmp_path / "a.safetensors", model, alpha=4).layers
            assert len(layers) == 6
            for leaf, (kind, number) in PARTS.items():
                layer = layers[f"transformer.transformer_blocks.0.attn.{leaf}"]
                assert torch.equal(layer.up, ups[kind].chunk(3)[number])


@pytest.mark.parametrize("module", ["single_transformer_blocks.0.proj_mlp", "blocks.0.x_proj"])
def test_an_adapter_of_another_transformer_is_inspected(tmp_path: Path, module: str) -> None:
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(6, 2)}
    tensors = {f"transformer.{module}.{name}.weight": t for name, t in factors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert inspect_adapter(tmp_path / "a.safetensors").tools["ComfyUI and Forge"] == "-"


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_verdicts_on_diffusers_and_comfyui_are_true(
    tmp_path: Path, folder: Path, layers_of: Callable[..., Layers], axis: str | None
) -> None:
    from diffusers import Flux2KleinPipeline

    layers = layers_of(axis)
    file = write(tmp_path / "a.safetensors", layers, "diffusion_model")
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    changed = [name for name, _ in pipeline.transformer.named_modules() if "lora" in name]
    tools = inspect_adapter(file).tools
    assert tools["diffusers"].startswith("wrong: it finds none") == (not changed)
    if axis == "input":
        return
    tools = inspect_adapter(write(tmp_path / "b.safetensors", layers)).tools
    if axis is None:  # ComfyUI lacks Diffusers' names of these.
        lost = [n for n in layers if "modulation" in n or "time_guidance" in n]
        assert tools["ComfyUI and Forge"].startswith(f"wrong: it leaves {len(lost)} layers (")
        known = {name: layer for name, layer in layers.items() if name not in lost}
        tools = inspect_adapter(write(tmp_path / "c.safetensors", known)).tools
        assert tools["ComfyUI and Forge"] == "exact: in ComfyUI; Forge was not checked"
    else:
        assert tools["ComfyUI and Forge"].startswith("wrong: the magnitudes are ignored")
