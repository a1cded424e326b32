"""Merged models and derived adapters of Z-Image, against Diffusers and the live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES, UnsupportedModelError
from dora_diffusion.export import (
    combine_adapters,
    convert_adapter,
    export_checkpoint,
    extract_adapter,
    inspect_model,
    verify_checkpoint,
)
from dora_diffusion.export.files import ExportError
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.export.programs import kind_of
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.weights import CheckpointLayoutError
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import MODEL_VERDICTS
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.models.load import check_components, load_components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from tests.z_image import write_z_image

Layers = dict[str, LayerWeights]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def adapter(folder: Path, random_adapter: Callable[..., Layers]) -> Path:
    layers = random_adapter(folder, components=["transformer"])
    file = folder.parent / "adapter.safetensors"
    return write_adapter(file, AdapterFile(layers, AdapterMetadata("z-image")))


@pytest.fixture(scope="module")
def merged(folder: Path, adapter: Path) -> dict[str, Path]:
    """The merged model as a folder, as a file with the diffusion model alone, and as one file."""
    outputs = {
        name: folder.parent / name for name in ("merged", "one.safetensors", "all.safetensors")
    }
    for name, output in outputs.items():
        export_checkpoint(folder, adapter, output, complete="all" in name)
    return outputs


@torch.no_grad()
def predict(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = list(torch.randn(2, 4, 1, 8, 8, generator=generator))
    captions = [torch.randn(n, 32, generator=generator) for n in (5, 9)]
    (out,) = transformer(images, torch.tensor([0.1, 0.7]), captions, return_dict=False)
    return torch.stack(out)


def states(components: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in components.modules().items()
        for key, tensor in module.state_dict().items()
    }


def test_a_merged_folder_predicts_as_the_live_model(
    folder: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(merged["merged"])
    base = predict(ZImagePipeline.from_pretrained(folder).transformer)
    live = predict(load_adapted(folder, adapter)[0].denoiser)
    assert (live - base).abs().max() > 0.1
    assert (predict(pipeline.transformer) - live).abs().max() < 2e-5
    adapted = {f"{name}.weight" for name in read_adapter(adapter).layers}
    before, after = (states(load_components(path)) for path in (folder, merged["merged"]))
    names = {"denoiser": "transformer"}
    for key, tensor in before.items():
        part, _, path = key.partition(".")
        if f"{names.get(part, part)}.{path}" not in adapted:
            assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", ["one.safetensors", "all.safetensors"])
def test_diffusers_reads_the_transformer_of_a_file(
    folder: Path, merged: dict[str, Path], name: str
) -> None:
    """Diffusers' converter for files of ComfyUI splits the joined projections."""
    from diffusers import ZImageTransformer2DModel

    read = ZImageTransformer2DModel.from_single_file(
        str(merged[name]), config=str(folder), subfolder="transformer", local_files_only=True
    )
    expected = ZImageTransformer2DModel.from_pretrained(merged["merged"] / "transformer")
    assert read.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor), key


def test_projections_are_joined(folder: Path, merged: dict[str, Path]) -> None:
    weights = load_file(merged["merged"] / "transformer" / "diffusion_pytorch_model.safetensors")
    one, whole = load_file(merged["one.safetensors"]), load_file(merged["all.safetensors"])
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"):
        parts = [weights[f"{block}.attention.to_{part}.weight"] for part in "qkv"]
        key = f"{block}.attention.qkv.weight"
        assert torch.equal(one[key], torch.cat(parts))
        assert torch.equal(whole[f"model.diffusion_model.{key}"], torch.cat(parts))
    assert {key.removeprefix("model.diffusion_model.") for key in whole} > one.keys()
    assert {key.split(".")[0] for key in whole} == {"model", "vae", "text_encoders"}
    assert "text_encoders.qwen3_4b.transformer.model.layers.2.self_attn.q_norm.weight" in whole
    assert whole["vae.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)


@pytest.mark.parametrize("name", ["one.safetensors", "all.safetensors"])
def test_a_file_is_a_base_model(
    tmp_path: Path, folder: Path, adapter: Path, merged: dict[str, Path], name: str
) -> None:
    base = BaseModel(merged[name], model_config=folder)
    expected, loaded = states(load_components(merged["merged"])), states(load_components(base))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert not any(check_components(base).values())
    # Written again as a folder it is the same model, and with the adapter it is verified.
    export_checkpoint(base, (), tmp_path / "folder")
    again = states(load_components(tmp_path / "folder"))
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())
    twice = export_checkpoint(base, adapter, tmp_path / "twice.safetensors")
    assert verify_checkpoint(twice, base, adapter).ok
    assert load_file(twice).keys() == load_file(merged["one.safetensors"]).keys()


def test_files_without_their_other_parts_are_refused(
    tmp_path: Path, folder: Path, merged: dict[str, Path]
) -> None:
    one, output = merged["one.safetensors"], tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="set --model_config to a Diffusers folder"):
        load_components(one)
    with pytest.raises(CheckpointLayoutError, match="does not have the text_encoder and vae"):
        export_checkpoint(one, (), output, complete=True)
    with pytest.raises(ExportError, match="contains the diffusion model alone, without the VAE"):
        export_checkpoint(BaseModel(folder, vae=folder / "vae"), (), output)
    with pytest.raises(AdapterFormatError, match="it is a model, not an adapter"):
        read_adapter(one)
    tensors = {key: tensor for key, tensor in load_file(one).items() if "cap_embedder" not in key}
    save_file(tensors, output)
    with pytest.raises(UnsupportedModelError, match="is not a full checkpoint of"):
        inspect_model(output)


@pytest.mark.parametrize("name", ["merged", "one.safetensors", "all.safetensors"])
def test_a_model_is_reported(merged: dict[str, Path], name: str) -> None:
    report = inspect_model(merged[name])
    assert report.family.name == "z-image"
    assert report.schedule.startswith("flow prediction")
    assert report.dtypes == ["float32"]
    assert report.tools["diffusers"].partition(":")[0] == (
        "exact" if name == "merged" else "exact if told so"
    )
    assert report.tools["ComfyUI"].startswith("no: it loads models of the released shapes")


@pytest.mark.parametrize("width", [3840, 48])
def test_kinds_of_models(width: int) -> None:
    specs = {"transformer.cap_embedder.1.weight": TensorSpec(torch.float32, (width, 2560))}
    end = "" if width == 3840 else " of another shape"
    for is_file, left_out, kind in (
        (False, set(), "transformer folder"),
        (True, {"vae"}, "transformer file"),
        (True, set(), "complete transformer file"),
    ):
        model: Any = SimpleNamespace(
            family=FAMILIES["z-image"], is_single_file=is_file, left_out=left_out, specs=specs,
            schedule=dict,
        )  # fmt: skip
        assert kind_of(model) == kind + end
        assert kind + end in MODEL_VERDICTS


@pytest.mark.parametrize("name", ["merged", "one.safetensors"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_an_adapter_is_extracted(
    tmp_path: Path, folder: Path, merged: dict[str, Path], name: str, axis: Any
) -> None:
    """Rank 48 is full rank, but for the time embedding, whose change has the output axis."""
    fit = FitSettings(rank=48, norm_axis=axis)
    report = extract_adapter(folder, merged[name], tmp_path / "a.safetensors", fit)
    assert report.target == ("diffusers" if axis == "output" else "diffusion_model")
    assert report.layers == 37
    errors = dict(report.errors)
    if axis == "input":
        assert errors.pop("transformer.t_embedder.mlp.0") > 0.1
    else:
        live = predict(load_adapted(folder, report.path)[0].denoiser)
        wanted = predict(load_components(merged["merged"]).denoiser)
        assert (live - wanted).abs().max() < 1e-3
    assert max(errors.values()) < 1e-4
    with pytest.raises(AdapterFormatError, match="no kohya file of a transformer is known"):
        extract_adapter(
            folder, merged[name], tmp_path / "b", FitSettings(rank=4), key_format="kohya"
        )


def test_adapters_are_combined_and_resized(tmp_path: Path, folder: Path, adapter: Path) -> None:
    both = [(adapter, 0.5), (adapter, 0.5)]
    sum_of_two = combine_adapters(folder, both, tmp_path / "sum.safetensors")
    assert (sum_of_two.layers, sum_of_two.target) == (37, "diffusers")
    assert sum_of_two.total_error < 1e-4
    live, again = (
        predict(load_adapted(folder, path)[0].denoiser) for path in (adapter, sum_of_two.path)
    )
    assert (live - again).abs().max() < 1e-3
    fit = FitSettings(rank=2)
    small = convert_adapter(adapter, tmp_path / "b.safetensors", "smaller-rank", fit, base=folder)
    assert {layer.rank for layer in read_adapter(small.path).layers.values()} == {2}
    assert 0.01 < small.total_error < 0.9
