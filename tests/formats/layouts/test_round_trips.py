"""Every target to every other and back, with the names of the model at hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import dora_diffusion
from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.formats.names.modules import UNetLayout
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.formats.layouts.helpers import (
    MakeAdapter,
)

EMBEDDED = Path(dora_diffusion.__file__).parent / "models" / "embedded"


FAMILIES = ("sd1", "sd2", "sdxl")


HOLDS = {"output": ("diffusers", "peft", "kohya"), "input": ("kohya",)}
HOLDS |= {"none": HOLDS["output"]}


def meant(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``m (W + s B A) / norm(W + s B A)`` in float64."""
    product = (layer.up.double().flatten(1) @ layer.down.double().flatten(1)).view_as(weight)
    changed = weight.double() + layer.alpha / layer.down.shape[0] * product
    if layer.magnitude is None:
        return changed
    dims = [dim for dim in range(weight.ndim) if dim != (layer.norm_axis == "input")]
    norm = changed.square().sum(dims, keepdim=True).sqrt()
    return changed * layer.magnitude.double().view_as(norm) / norm


def kind_of(name: str, layer: LayerWeights) -> str:
    """The kind of a layer, in the words in which formats treat them differently."""
    out, into, *kernel = layer.weight_shape
    shape = "square" if out == into else "oblong"
    component = name.partition(".")[0]
    strided = "strided " if ".downsamplers." in name else ""
    return f"{component} {strided}{shape} {'x'.join(map(str, kernel)) or 'linear'}"


KINDS = {
    "unet square linear", "unet oblong linear", "unet oblong 1x1", "unet square 3x3",
    "unet oblong 3x3", "unet strided square 3x3", "text_encoder square linear",
    "text_encoder oblong linear",
}  # fmt: skip


KINDS_OF = {
    "sd1": KINDS | {"unet square 1x1"},
    "sd2": KINDS,
    "sdxl": KINDS | {"text_encoder_2 square linear", "text_encoder_2 oblong linear"},
}


AXES, SCALES = ("output", "input", "none"), ("alpha", "rslora")
# In the quick suite: every family on every axis, and both scales on each of these.
CASES = [
    pytest.param(family, axis, scale, marks=[pytest.mark.slow] * ((f + a + s) % 2))
    for f, family in enumerate(FAMILIES)
    for a, axis in enumerate(AXES)
    for s, scale in enumerate(SCALES)
]


@pytest.fixture
def adapter(
    family: str, axis: str, scale: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> AdapterFile:
    """Ranks 2 to 4, alphas 1 to 5 (or 3, rank-stabilised) on some layers of every kind."""
    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, axis=None if axis == "none" else axis, mixed_ranks=True)
    if scale == "rslora":
        layers = {
            name: dataclasses.replace(layer, alpha=3.0 * layer.rank**0.5)
            for name, layer in layers.items()
        }
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(kind_of(name, layers[name]), []).append(name)
    layers = {n: layers[n] for names in kinds.values() for n in names[:: len(names) // 4 + 1]}
    assert any(layer.alpha != layer.rank for layer in layers.values())
    assert {kind_of(name, layer) for name, layer in layers.items()} == KINDS_OF[family]
    return AdapterFile(layers, AdapterMetadata(family, "some/model", "sks dog", (512,)))


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("family", "axis", "scale"), CASES)
def test_round_trips(
    tmp_path: Path, family: str, axis: str, adapter: AdapterFile, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    with PipelineFolder.open(folder) as pipeline:
        weights = {name: pipeline[f"{name}.weight"] for name in adapter.layers}
    expected = {name: meant(weights[name], layer) for name, layer in adapter.layers.items()}
    for first, second in itertools.product(HOLDS[axis], repeat=2):
        here = tmp_path / f"{first}-{second}"
        one = write_adapter(here / "1", adapter, first)
        read = read_adapter(one)
        assert contents(write_adapter(here / "again", read, first)) == contents(one)
        two = write_adapter(here / "2", read, second)
        for last in (read_adapter(two), read_adapter(two, PipelineFolder(folder))):
            assert last.notes == ()
            assert last.layers.keys() == expected.keys()
            assert last.metadata.trigger == "sks dog"
            for name, wanted in expected.items():
                found = merge_tensor(weights[name], [(last.layers[name], Strengths())])
                off = (found.double() - wanted).abs().max() / wanted.abs().max()
                assert off < 1e-6, (first, second, name, off)
                assert last.layers[name].rank == adapter.layers[name].rank


def test_kohya_names_follow_a_unet_of_another_depth(tmp_path: Path) -> None:
    names = ("down_blocks.3.resnets.0.conv1", "down_blocks.2.attentions.0.proj_in",
             "up_blocks.1.resnets.1.conv2", "down_blocks.2.resnets.0.conv1")  # fmt: skip
    factors = torch.randn(2, 4, 1, 1), torch.randn(5, 2, 1, 1)
    layers = {f"unet.{name}": LayerWeights(*factors, None, 2.0) for name in names}
    metadata = AdapterMetadata("sdxl", extra={"unet_layers_per_block": "1"})
    first = write_adapter(tmp_path / "first", AdapterFile(layers, metadata), "diffusers")
    kohya = write_adapter(tmp_path / "kohya.safetensors", read_adapter(first), "kohya")
    with safe_open(kohya, "pt") as file:
        modules = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    # With one layer per block, a level is two blocks: its resnet and its stride.
    assert "lora_unet_input_blocks_7_0_in_layers_2" in modules
    assert "lora_unet_input_blocks_5_1_proj_in" in modules
    assert "lora_unet_output_blocks_3_0_out_layers_3" in modules
    assert set(read_adapter(kohya).layers) == set(layers)


UPSAMPLERS = {
    "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_1_2_conv",
    "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_3_1_conv",
    "unet.up_blocks.2.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
}


def test_the_slot_of_an_upsampler_follows_the_attention_of_its_level(tmp_path: Path) -> None:
    """Behind attention it is the third module of its block; the record of that goes along."""
    factors = torch.randn(2, 4, 3, 3), torch.randn(4, 2, 1, 1)
    layers = {name: LayerWeights(*factors, None, 2.0) for name in UPSAMPLERS}
    layout = UNetLayout(1, (True, False, True, False))
    first = write_adapter(
        tmp_path / "first.safetensors", AdapterFile(layers, AdapterMetadata("sdxl")), "kohya",
        unet_layout=layout,
    )  # fmt: skip
    diffusers = write_adapter(tmp_path / "d.safetensors", read_adapter(first), "diffusers")
    again = write_adapter(tmp_path / "again.safetensors", read_adapter(diffusers), "kohya")
    for path in (first, again):
        with safe_open(path, "pt") as file:
            modules = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
        assert modules == set(UPSAMPLERS.values())
        assert set(read_adapter(path).layers) == set(layers)


@pytest.mark.parametrize("target", ["kohya", "comfyui", "dense", "lora"])
def test_kohya_names_follow_the_base(tmp_path: Path, target: str) -> None:
    """For a file that says nothing of the UNet it was trained on, of one layer per block."""
    names = {
        "unet.down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k":
            "lora_unet_input_blocks_5_1_transformer_blocks_0_attn2_to_k",
        "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_3_2_conv",
        "unet.up_blocks.2.upsamplers.0.conv": "lora_unet_output_blocks_5_1_conv",
    }  # fmt: skip
    base = EMBEDDED / "tiny-sdxl"
    model = PipelineFolder(base)
    shapes = module_shapes(model)
    tensors = {}
    for name in names:
        out, into, *kernel = shapes[name]
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into, *kernel)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *[1] * len(kernel))
    save_file(tensors, tmp_path / "foreign.safetensors")
    path = convert_adapter(
        tmp_path / "foreign.safetensors", tmp_path / "out.safetensors", target, base=base
    ).path
    with safe_open(path, "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == set(names.values())  # noqa: SIM118
    if target == "kohya":
        layers = read_adapter(path, model).layers
        for name in names:
            assert torch.equal(layers[name].down, tensors[f"{name}.lora_A.weight"])
