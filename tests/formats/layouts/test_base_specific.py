"""Files made for one base model, computed as ComfyUI and LyCORIS do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.formats.layouts.helpers import (
    MakeAdapter,
)


def kohya_weights(
    folder: Path, layers: dict[str, LayerWeights]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kohya name (SD1) -> (base weight, merged weight)."""
    pairs = {}
    with PipelineFolder.open(folder) as pipeline:
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            prefix = "lora_unet_" if component == "unet" else "lora_te_"
            weight = pipeline[f"{name}.weight"]
            merged = merge_tensor(weight, [(layer, Strengths())])
            pairs[prefix + path.replace(".", "_")] = (weight, merged)
    return pairs


def comfyui_merge(weight: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """Compute as ComfyUI 0.3.64 does, in its own order: W + delta, times m / norm."""
    up, down = tensors[f"{prefix}.lora_up.weight"], tensors[f"{prefix}.lora_down.weight"]
    scale = tensors[f"{prefix}.alpha"] / down.shape[0]
    changed = weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    magnitude = tensors[f"{prefix}.dora_scale"]
    if magnitude.shape[0] == weight.shape[0]:
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    else:
        columns = changed.transpose(0, 1).flatten(1).norm(dim=1)
        norm = columns.view(1, -1, *[1] * (weight.ndim - 2))
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))


@pytest.mark.parametrize(
    ("axis", "target"), [("output", "comfyui"), ("input", "kohya"), ("input", "comfyui")]
)
def test_comfyui_computes_the_merge(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str, target: str
) -> None:
    layers = random_adapter(sd1_folder, axis=axis, every=3)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "b", target, base=sd1_folder)
    assert report.errors == {}
    tensors = load_file(report.path)
    for prefix, (weight, merged) in kohya_weights(sd1_folder, layers).items():
        result = comfyui_merge(weight, tensors, prefix)
        torch.testing.assert_close(result, merged, rtol=0, atol=1e-6, msg=prefix)
    if axis == "output":
        with pytest.raises(AdapterFormatError, match="exact in ComfyUI on one base"):
            read_adapter(report.path)
        stated = read_header(report.path).metadata["dora_diffusion.comfyui_formula"]
        assert stated == "m * (W + s B A) / norm(W), as in ComfyUI 0.3.64 and Forge"
    else:  # exact there as it is, on every base: the same file as `kohya` gives
        kohya = load_file(convert_adapter(source, tmp_path / "k", "kohya").path)
        report = convert_adapter(source, tmp_path / "c", target)
        assert report.target == "kohya"
        plain = report.path
        found = load_file(plain)
        assert found.keys() == kohya.keys()
        assert all(torch.equal(tensor, kohya[key]) for key, tensor in found.items())
        assert read_header(plain).metadata["dora_diffusion.target"] == "kohya"
        assert "dora_diffusion.comfyui_formula" not in read_header(plain).metadata
        assert inspect_adapter(plain).tools["A1111"] == "exact"


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dense_differences_merge_in_lycoris(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str
) -> None:
    from diffusers import UNet2DConditionModel
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    layers = random_adapter(sd1_folder, axis=axis, every=4, components=["unet"])
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "dense.safetensors", "dense", base=sd1_folder)
    unet = UNet2DConditionModel.from_pretrained(sd1_folder / "unet")
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        network, _ = create_lycoris_from_weights(1.0, str(report.path), unet)
    finally:
        LycorisNetwork.LORA_PREFIX = "lycoris"
    assert len(network.loras) == len(layers)
    network.merge_to(1.0)
    with PipelineFolder.open(sd1_folder) as pipeline:
        for name, layer in layers.items():
            expected = merge_tensor(pipeline[f"{name}.weight"], [(layer, Strengths())])
            weight = unet.get_submodule(name.removeprefix("unet.")).weight
            torch.testing.assert_close(weight.data, expected, rtol=0, atol=1e-6, msg=name)
