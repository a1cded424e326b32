"""``convert --to smaller-rank``: a smaller rank, with the base and without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dora_diffusion.export import ExportError, convert_adapter, inspect_adapter
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from tests.export.helpers import MakeAdapter, tensors_of


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_without_the_base_the_update_is_truncated(
    tmp_path: Path, sd1_folder: Path, axis: str | None, random_adapter: MakeAdapter
) -> None:
    """Magnitudes stay; the error is that of the update, by NumPy."""
    layers = random_adapter(sd1_folder, every=8, axis=axis)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(
        source, tmp_path / "b", "smaller-rank", FitSettings(rank=3, conv_rank=2)
    )
    found = read_adapter(report.path).layers
    kohya = axis == "input"
    assert report.path.name == (
        "adapter_kohya.safetensors" if kohya else "pytorch_lora_weights.safetensors"
    )
    for name, layer in layers.items():
        rank = 2 if layer.down.ndim == 4 else 3
        delta = layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1)).double().numpy()
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        other = found[name]
        got = other.scale * (other.up.flatten(1) @ other.down.flatten(1)).double().numpy()
        assert np.abs(got - best).max() < 1e-5 * np.abs(delta).max(), name
        assert report.errors[name] == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s))
        assert other.rank == rank
        if layer.magnitude is not None:
            assert torch.equal(other.magnitude, layer.magnitude)
    said = [note for note in report.notes if "--base" in note]
    assert len(said) == (axis is not None)


def test_with_the_base_it_is_nearer(
    tmp_path: Path, sd1_folder: Path, dora: Path, random_adapter: MakeAdapter
) -> None:
    """In every layer, by the distance of the weights, which is what is stated."""
    layers, weights = read_adapter(dora).layers, tensors_of(sd1_folder)
    distances = {}
    for base in (None, sd1_folder):
        report = convert_adapter(
            dora, tmp_path / str(base is None), "smaller-rank", FitSettings(rank=2), base=base
        )
        found = read_adapter(report.path).layers
        for name, layer in layers.items():
            weight = weights[f"{name}.weight"].double()
            wanted, got = (merge_tensor(weight, [(w, Strengths())]) for w in (layer, found[name]))
            distances[name, base] = ((got - wanted).norm() / (wanted - weight).norm()).item()
            if base:
                assert report.errors[name] == pytest.approx(distances[name, base], rel=1e-3)
                assert distances[name, base] < distances[name, None], name
    said = inspect_adapter(report.path).tools["diffusers"]
    assert said == (
        f"exact for this DoRA, which is off the original DoRA by {report.total_error:.1%}"
    )


def test_energy_chooses_each_layers_rank(tmp_path: Path, dora: Path) -> None:
    report = convert_adapter(dora, tmp_path / "b", "smaller-rank", FitSettings(energy=0.8))
    found, layers = read_adapter(report.path).layers, read_adapter(dora).layers
    for name, layer in layers.items():
        s = np.linalg.svd((layer.up.flatten(1) @ layer.down.flatten(1)).numpy(), compute_uv=False)
        held = (s**2).cumsum() / (s**2).sum()
        assert found[name].rank == int(np.searchsorted(held, 0.8)) + 1, name
    assert {layer.rank for layer in found.values()} > {3}


def test_a_rank_that_is_large_enough_changes_nothing(
    tmp_path: Path, sd1_folder: Path, dora: Path
) -> None:
    layers = read_adapter(dora).layers
    for base in (None, sd1_folder):
        report = convert_adapter(
            dora, tmp_path / "b", "smaller-rank", FitSettings(rank=4), base=base, overwrite=True
        )
        found = read_adapter(report.path).layers
        for name, layer in layers.items():
            assert torch.equal(found[name].down, layer.down)
            assert torch.equal(found[name].up, layer.up)
        assert "approximation" not in read_adapter(report.path).metadata.extra


def test_a_rank_must_be_given(tmp_path: Path, sd1_folder: Path, dora: Path) -> None:
    with pytest.raises(ExportError, match="give --rank, --conv_rank or --energy"):
        convert_adapter(dora, tmp_path / "b", "smaller-rank")
    smaller = convert_adapter(
        dora, tmp_path / "c", "lora", FitSettings(energy=0.5), base=sd1_folder
    )
    assert inspect_adapter(smaller.path).metadata.extra["approximation"] == (
        "singular values, rank 64, energy 0.5"
    )
