"""The compact file of a VeRA: what it stands for, and what of it is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_diffusion.formats.adapter.file import (
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.layouts.vera import VeraLayer, write_vera
from dora_diffusion.numerics.projections import Projections
from tests.formats.adapter.helpers import BLOCK, MODEL
from tests.formats.golden.formula import magnitude, numbers

SHAPES = {
    f"unet.{BLOCK}.attn1.to_q": (8, 8),
    f"unet.{BLOCK}.attn2.to_k": (6, 8),
    "unet.conv_in": (5, 4, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (4, 4),
}
OWN = "dora_diffusion."


def layers_of(axis: str = "output", magnitudes: bool = True) -> dict[str, VeraLayer]:
    generator = torch.Generator().manual_seed(4)
    shared = {
        "unet": Projections.of([s for n, s in SHAPES.items() if n.startswith("unet")], 7, 5),
        "text_encoder": Projections.of([(4, 4)], 3, 2**40),
    }
    made = {}
    for name, shape in SHAPES.items():
        projections = shared[name.partition(".")[0]]
        size = shape[axis == "input"]
        made[name] = VeraLayer(
            projections, shape, torch.randn(projections.rank, generator=generator),
            torch.randn(shape[0], generator=generator),
            torch.rand(size, generator=generator) if magnitudes else None, axis,
        )  # fmt: skip
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_vera(tmp_path, layers_of(), AdapterMetadata(family="sd1", trigger="sks mug"))


def parts(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata()


def changed(file: Path, **facts: object) -> Path:
    """The file with other facts of the UNet's projections."""
    tensors, metadata = parts(file)
    projections = json.loads(metadata[OWN + "projections"])
    projections["unet"] |= facts
    save_file(tensors, file, {**metadata, OWN + "projections": json.dumps(projections)})
    return file


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("magnitudes", [True, False])
def test_it_stands_for_the_dense_formula(tmp_path, axis, magnitudes):
    layers = layers_of(axis, magnitudes)
    adapter = read_adapter(write_vera(tmp_path, layers, AdapterMetadata()))
    assert set(adapter.layers) == set(SHAPES)
    for name, layer in adapter.layers.items():
        vera = layers[name]
        down, up = vera.projections.factors(vera.shape, torch.device("cpu"))
        first = vera.d.double().diag() @ down.flatten(1).double()
        expected = vera.b.double().diag() @ up.flatten(1).double() @ first
        ours = layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
        assert layer.weight_shape == vera.shape
        assert (layer.magnitude is None) is not magnitudes
        if magnitudes:
            assert layer.norm_axis == axis
            assert torch.equal(layer.magnitude, vera.magnitude)


def test_it_holds_vectors_and_facts_alone(file):
    tensors, metadata = parts(file)
    values = sum(layer.d.numel() + 2 * layer.b.numel() for layer in layers_of().values())
    assert sum(tensor.numel() for tensor in tensors.values()) == values
    report = report_on(file)
    assert report.parameters == values
    assert report.metadata.trigger == "sks mug"
    assert "drawn from the seed 5, 1099511627776" in report.notes[0]
    assert all(verdict.startswith("convert") for verdict in report.tools.values())
    assert json.loads(metadata[OWN + "projections"])["unet"]["inputs"] == {"1x1": 8, "3x3": 4}


def test_a_folder_with_the_ordinary_file_too_means_that(file, tmp_path):
    adapter = dataclasses.replace(read_adapter(file), metadata=AdapterMetadata(family="sd1"))
    assert read_adapter(tmp_path).notes
    write_adapter(tmp_path / "dora_kohya.safetensors", adapter, "kohya")
    assert read_adapter(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"seed": 6}, "differ from the ones in training"),
        ({"sha256": "0" * 64}, "differ from the ones in training"),
        ({"rank": 2**40}, "projections of"),
        ({"rank": 0}, "sizes must be positive"),
        ({"inputs": {"1x1": 8}}, "do"),
        ({"inputs": None}, "do not fit together"),
    ],
)
def test_projections_that_cannot_be_drawn_again_are_refused(file, facts, reason):
    with pytest.raises(AdapterFormatError, match=reason):
        read_adapter(changed(file, **facts))


def test_damage_is_refused(file):
    tensors, metadata = parts(file)
    name = next(iter(SHAPES))
    broken = [
        ({k: t for k, t in tensors.items() if k != f"{name}.vera_lambda_d"}, metadata),
        (tensors | {f"{name}.vera_lambda_b": torch.zeros(3)}, metadata),
        (tensors | {f"{name}.vera_lambda_d": torch.full((7,), torch.nan)}, metadata),
        (tensors | {"other": torch.zeros(3)}, metadata),
        (tensors, {**metadata, OWN + "shapes": "{"}),
        (tensors, {**metadata, OWN + "shapes": json.dumps({name: [8, 9]})}),
        (tensors, {**metadata, OWN + "shapes": "{}"}),
        (tensors, {k: v for k, v in metadata.items() if k != OWN + "projections"}),
    ]
    for tensors, metadata in broken:
        save_file(tensors, file, metadata)
        with pytest.raises(AdapterFormatError, match=r"^vera.safetensors: "):
            read_adapter(file)


def test_it_is_checked_against_the_base(file):
    with pytest.raises(AdapterFormatError, match="has no module for"):
        read_adapter(file, MODEL)
    with pytest.raises(AdapterFormatError, match="a VeRA has none"):
        read_adapter(file, alpha=2.0)


GOLDEN = Path(__file__).parent.parent / "golden" / "vera" / "vera.safetensors"


def golden_layers() -> dict[str, VeraLayer]:
    """Reference of its content: the golden files' numbers between projections from the seed 5."""
    shared = Projections.of(SHAPES.values(), 3, 5)
    return {
        name: VeraLayer(
            shared, shape, numbers(f"{name}:d", [3]), numbers(f"{name}:b", shape[:1]),
            magnitude(name, shape, "output"),
        )
        for name, shape in SHAPES.items()
    }  # fmt: skip


def test_a_file_of_the_first_version_is_read_bit_for_bit():
    """It is never written again: files of people must stay readable."""
    digest = hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    assert digest == "66bca63fab37bd0c6dc2577aa52f47869ad826365d322eaec632990b43d62056"
    found = read_adapter(GOLDEN).layers
    for name, layer in golden_layers().items():
        down, up = layer.projections.factors(layer.shape, torch.device("cpu"))
        rows = [-1, *[1] * (len(layer.shape) - 1)]
        assert torch.equal(found[name].down, layer.d.view(rows) * down)
        assert torch.equal(found[name].up, layer.b.view(rows) * up)
        assert torch.equal(found[name].magnitude, layer.magnitude)
    assert len(found) == len(SHAPES)
