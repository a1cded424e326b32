"""Magnitudes of every shape: their axis is told, or the file is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFormatError,
    read_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import (
    BLOCK,
    MakeAdapter,
    SameLayers,
    kohya,
    kohya_linear,
    saved,
)


@pytest.mark.parametrize(
    ("shape", "size", "axis"),
    [((6, 1), (6, 8), "output"), ((1, 8), (6, 8), "input"), ((8, 1), (8, 8), "output"),
     ((1, 8), (8, 8), "input")],
)  # fmt: skip
def test_the_axis_is_told_by_shape_and_rank(
    tmp_path: Path, shape: tuple[int, ...], size: tuple[int, int], axis: str
) -> None:
    save_file(kohya_linear(shape, *size), tmp_path / "a.safetensors")
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert layer.norm_axis == axis
    assert layer.alpha == pytest.approx(2**0.5)  # rsLoRA: alpha 1 * sqrt(rank 2)


@pytest.mark.parametrize("shape", [(8,), (6, 8), (1, 1)])
def test_a_magnitude_without_an_axis_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file(kohya_linear(shape), tmp_path / "a.safetensors")
    reason = "flat" if len(shape) == 1 else "fits neither axis"
    with pytest.raises(AdapterFormatError, match=rf"a\.safetensors: unet\..*{reason}"):
        read_adapter(tmp_path / "a.safetensors")


def slightly_moved(folder: Path, layers: dict[str, LayerWeights]) -> dict[str, LayerWeights]:
    """The layers with magnitudes 1% from the base's norms, as training leaves them."""
    generator = torch.Generator().manual_seed(3)
    moved = {}
    with PipelineFolder.open(folder) as pipeline:
        for name, layer in layers.items():
            norm = weight_norm(pipeline[f"{name}.weight"], layer.norm_axis)
            norm = norm * (1 + 0.01 * torch.randn(norm.shape, generator=generator))
            moved[name] = dataclasses.replace(layer, magnitude=norm)
    return moved


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_flat_magnitudes_are_placed_by_the_base(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers,
    axis: str, square: bool,
) -> None:  # fmt: skip
    """By the shapes of those that are not square, or by the norms if there is none."""
    layers = slightly_moved(sd1_folder, random_adapter(sd1_folder, axis=axis, every=3))
    if square:
        layers = {n: one for n, one in layers.items() if len(set(one.weight_shape[:2])) == 1}
    tensors = kohya(tmp_path, layers)
    flat = {k: t.flatten() if k.endswith("dora_scale") else t for k, t in tensors.items()}
    path = saved(tmp_path, flat)
    with pytest.raises(AdapterFormatError, match=r"its dora_scale is flat.*Give the base model"):
        convert_adapter(path, tmp_path / "c", "kohya", family="sd1")
    report = convert_adapter(path, tmp_path / "c", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(report.path).layers, layers, tolerance=1e-5)
    assert report.notes == (
        f"{len(layers)} magnitudes were flat: read on the {axis} axis, by the base",
    )


def test_magnitudes_of_no_axis_are_refused_even_with_a_base(
    tmp_path: Path, sd1_folder: Path
) -> None:
    prefix = f"lora_unet_{BLOCK}.attn1.to_q".replace(".", "_")
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(2, 64),
        f"{prefix}.lora_up.weight": torch.randn(64, 2),
        f"{prefix}.alpha": torch.tensor(2.0),
        f"{prefix}.dora_scale": 100 * torch.rand(64),
    }
    with pytest.raises(AdapterFormatError, match="do not determine it"):
        convert_adapter(saved(tmp_path, tensors), tmp_path / "c", "kohya", base=sd1_folder)


def test_convolutions_in_pefts_shape(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, assert_same_layers: SameLayers
) -> None:
    """(1, out, 1, 1): told by the ones that are not square, for those that are, too."""
    layers = random_adapter(sd1_folder, every=2, components=["unet"])
    layers = slightly_moved(sd1_folder, layers)
    convs = {name for name, layer in layers.items() if layer.down.ndim == 4}
    square = {n for n in convs if layers[n].weight_shape[0] == layers[n].weight_shape[1]}
    assert 3 < len(square) < len(convs) - 3
    tensors = kohya(tmp_path, layers)

    def peft_shaped(keys: list[str]) -> dict[str, Tensor]:
        return {
            k: t.transpose(0, 1) if k in keys and t.ndim == 4 else t for k, t in tensors.items()
        }

    scales = [key for key in tensors if key.endswith("dora_scale")]
    report = convert_adapter(
        saved(tmp_path, peft_shaped(scales)), tmp_path / "c", "kohya", base=sd1_folder
    )
    assert_same_layers(read_adapter(report.path).layers, layers)
    assert report.notes == (
        f"{len(convs)} magnitudes had PEFT's shape (1, out, 1, 1): read on the output axis",
    )
    # With square convolutions alone, only the base can tell.
    names = ["lora_unet_" + n.removeprefix("unet.").replace(".", "_") for n in square]
    path = saved(tmp_path, peft_shaped([f"{name}.dora_scale" for name in names]))
    with pytest.raises(AdapterFormatError, match="of the same shape on both axes"):
        read_adapter(path)
    report = convert_adapter(path, tmp_path / "d", "kohya", base=sd1_folder)
    assert_same_layers(read_adapter(report.path).layers, layers)
    assert f"{len(square)} magnitudes were of a shape that fits both axes" in report.notes[0]
