"""Merged models of FLUX.2-klein, against Diffusers and the live model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import (
    export_checkpoint,
    extract_adapter,
    inspect_model,
    verify_checkpoint,
)
from dora_diffusion.export.files import ExportError
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import check_components, load_components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from tests.flux2_klein import write_flux2_klein


@pytest.fixture(scope="module", params=[False, True], ids=["4B", "9B"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2_klein(tmp_path_factory.mktemp("klein") / "model", is_9b=request.param)


@pytest.fixture(scope="module")
def adapter(folder: Path, random_adapter: Callable[..., dict[str, LayerWeights]]) -> Path:
    """An adapter whose magnitudes are on the input axis."""
    layers = random_adapter(folder, components=["transformer"], axis="input")
    written = AdapterFile(layers, AdapterMetadata("flux2-klein"))
    return write_adapter(folder.parent / "adapter.safetensors", written, "diffusion_model")


@pytest.fixture(scope="module")
def merged(folder: Path, adapter: Path) -> dict[str, Path]:
    """The merged model as a folder, and as a file with the diffusion model alone."""
    outputs = {name: folder.parent / name for name in ("merged", "one.safetensors")}
    for output in outputs.values():
        export_checkpoint(folder, adapter, output)
    return outputs


def states(components: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in components.modules().items()
        for key, tensor in module.state_dict().items()
    }


@torch.no_grad()
def test_a_merged_model_has_the_weights_of_the_live_one(
    folder: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    live = load_adapted(folder, adapter)[0].denoiser
    model = Flux2Transformer2DModel.from_pretrained(merged["merged"] / "transformer")
    states = torch.randn(2, 5, model.config.joint_attention_dim)
    inputs = {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": states,
        "timestep": torch.tensor([0.1, 0.7]), "img_ids": torch.ones(16, 4),
        "txt_ids": torch.ones(5, 4), "guidance": None, "return_dict": False,
    }  # fmt: skip
    (wanted,), (found,) = live(**inputs), model(**inputs)
    (before,) = load_components(folder).denoiser(**inputs)
    assert (wanted - before).abs().max() > 0.01
    assert (found - wanted).abs().max() < 2e-5


def test_diffusers_reads_the_transformer_of_a_file(folder: Path, merged: dict[str, Path]) -> None:
    """Diffusers' converter splits the joined projections, and swaps the halves of the last norm."""
    read = Flux2Transformer2DModel.from_single_file(
        str(merged["one.safetensors"]),
        config=str(folder),
        subfolder="transformer",
        local_files_only=True,
    )
    expected = Flux2Transformer2DModel.from_pretrained(merged["merged"] / "transformer")
    assert read.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor), key


def test_a_file_is_a_base_model(
    tmp_path: Path, folder: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    one = merged["one.safetensors"]
    base = BaseModel(one, model_config=folder)
    expected, loaded = states(load_components(merged["merged"])), states(load_components(base))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert not any(check_components(base).values())
    twice = export_checkpoint(base, adapter, tmp_path / "twice.safetensors")
    assert verify_checkpoint(twice, base, adapter).ok
    assert load_file(twice).keys() == load_file(one).keys()


def test_a_complete_file_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ExportError, match="no program is known that reads its transformer"):
        export_checkpoint(folder, (), tmp_path / "all.safetensors", complete=True)
    base = BaseModel(folder, vae=folder / "vae")
    with pytest.raises(ExportError, match="leave out --vae, or export a folder"):
        export_checkpoint(base, (), tmp_path / "one.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["merged", "one.safetensors"])
def test_a_model_is_reported(
    request: pytest.FixtureRequest, merged: dict[str, Path], name: str
) -> None:
    report = inspect_model(merged[name])
    is_9b = "9B" in request.node.name
    assert report.family.name == ("flux2-klein-9b" if is_9b else "flux2-klein")
    assert report.schedule.startswith("flow prediction")
    assert report.tools["ComfyUI"].startswith("no: it loads models of the released shapes")


@pytest.mark.parametrize("name", ["merged", "one.safetensors"])
def test_an_adapter_is_extracted(tmp_path: Path, folder: Path, merged: dict[str, Path], name: str):
    """A change of full rank on the output axis, from a folder and from a file."""
    fit = FitSettings(rank=48, norm_axis="output")
    report = extract_adapter(folder, merged[name], tmp_path / "a.safetensors", fit)
    assert report.target == "diffusers"
    assert max(dict(report.errors).values()) < 1e-4
