"""Analyses of files against plain NumPy, and of changes whose parts are known."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion import export_checkpoint
from dora_diffusion.export import ExportError
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.numerics.weights import NORM_AXES, LayerWeights, NormAxis
from lab.analysis import analyze_weights, decomposition
from lab.analysis.report import LayerChange
from tests.refusal import refused

MakeAdapter = Callable[..., dict[str, LayerWeights]]
MakeModel = Callable[..., Path]
Array = Any  # of float64


def rows(array: Array, axis: NormAxis) -> Array:
    """One row per channel."""
    array = array if axis == "output" else np.swapaxes(array, 0, 1)
    return array.reshape(array.shape[0], -1)


def norms(array: Array, axis: NormAxis) -> Array:
    return np.sqrt((rows(array, axis) ** 2).sum(1))


def adapted(weight: Array, layer: LayerWeights) -> Array:
    """The method's formula, written again in NumPy."""
    up, down = layer.up.double().numpy(), layer.down.double().numpy()
    delta = layer.alpha / len(down) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    direction = weight + delta.reshape(weight.shape)
    if layer.magnitude is None:
        return direction
    gain = layer.magnitude.double().numpy() / norms(direction, layer.norm_axis)
    kernel = [1] * (weight.ndim - 2)
    along = (-1, 1, *kernel) if layer.norm_axis == "output" else (1, -1, *kernel)
    return direction * gain.reshape(along)


def weights_of(folder: Path) -> dict[str, Array]:
    """All tensors of the UNet and the text encoder by canonical name, in float64."""
    tensors = {}
    for component in ("unet", "text_encoder"):
        (file,) = (folder / component).glob("*.safetensors")
        for key, tensor in load_file(file).items():
            path = key if component == "unet" or key.startswith("text_model.") else (
                f"text_model.{key}"
            )  # fmt: skip
            tensors[f"{component}.{path}"] = tensor.double().numpy()
    return tensors


def assert_is(change: LayerChange, before: Array, after: Array, axis: NormAxis) -> None:
    """Every figure of a layer, from its weights before and after, to 1e-6."""
    old, new = norms(before, axis), norms(after, axis)
    cosine = (rows(before, axis) * rows(after, axis)).sum(1) / (old * new)
    values = np.linalg.svd((after - before).reshape(len(before), -1), compute_uv=False)
    shares = values[values > 1e-12 * values[0]] / values.sum()
    close = {"rel": 1e-6, "abs": 1e-15}
    assert change.delta_m == pytest.approx(np.abs(new - old).mean(), **close)
    assert change.delta_d == pytest.approx((1 - cosine).mean(), **close)
    size = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert change.relative_change == pytest.approx(size, **close)
    leading = np.zeros(len(change.update.leading))
    leading[: len(values)] = values[: len(leading)]
    np.testing.assert_allclose(change.update.leading, leading, rtol=1e-6, atol=1e-7 * values[0])
    rank = np.exp(-(shares * np.log(shares)).sum())
    assert change.update.effective_rank == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize("axis", NORM_AXES)
@pytest.mark.parametrize(
    ("own_axis", "key_format"),
    [("output", "diffusers"), ("input", "kohya"), (None, "diffusers"), ("output", "peft")],
)
def test_an_adapter_against_numpy(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter, axis: NormAxis,
    own_axis: NormAxis | None, key_format: str,
) -> None:  # fmt: skip
    """Measured on either axis, whatever the adapter's own is."""
    layers = random_adapter(sd1_folder, axis=own_axis, every=4)
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), key_format)
    analysis = analyze_weights(path, sd1_folder, norm_axis=axis)
    (checkpoint,) = analysis.runs[0].checkpoints
    assert checkpoint.method == ("LoRA" if own_axis is None else "DoRA")
    assert {layer.name for layer in checkpoint.layers} == layers.keys()
    base, stored = weights_of(sd1_folder), read_adapter(path).layers
    for change in checkpoint.layers:
        weight, layer = base[f"{change.name}.weight"], stored[change.name]
        assert_is(change, weight, adapted(weight, layer), axis)
        if own_axis is None:
            assert change.low_rank is None
            continue
        product = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        inner = np.linalg.svd(layer.scale * product.numpy(), compute_uv=False)
        assert change.low_rank is not None
        found = change.low_rank.leading
        np.testing.assert_allclose(found, inner[: len(found)], rtol=1e-6, atol=1e-9 * inner[0])


def test_a_small_change_is_not_rounded_away(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    """An adapter after its first steps: a ten-thousandth of the weight."""
    base = weights_of(sd1_folder)
    layers = {
        name: dataclasses.replace(
            layer,
            up=layer.up * 1e-4,
            magnitude=torch.from_numpy(norms(base[f"{name}.weight"], "output") * 1.0001).float(),
        )
        for name, layer in random_adapter(sd1_folder, every=9).items()
    }
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    (checkpoint,) = analyze_weights(path, sd1_folder).runs[0].checkpoints
    assert checkpoint.whole.mean("delta_d") < 1e-7
    for change in checkpoint.layers:
        weight = base[f"{change.name}.weight"]
        assert_is(change, weight, adapted(weight, layers[change.name]), "output")


@pytest.mark.parametrize("axis", NORM_AXES)
def test_a_model_against_numpy(
    sd1_folder: Path, tuned_model: MakeModel, axis: NormAxis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "_BLOCK", 500)
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: Tensor) -> Tensor:
        if "mid_block" in name:
            return tensor
        return tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)

    folder = tuned_model(change)
    (checkpoint,) = analyze_weights(folder, sd1_folder, norm_axis=axis).runs[0].checkpoints
    before, after = weights_of(sd1_folder), weights_of(folder)
    matrices = {n.removesuffix(".weight") for n, t in before.items() if t.ndim > 1}
    unchanged = {name for name in matrices if "mid_block" in name}
    assert {layer.name for layer in checkpoint.layers} == matrices - unchanged
    assert checkpoint.unchanged == len(unchanged)
    others = [n for n, t in before.items() if t.ndim == 1 and not np.array_equal(t, after[n])]
    assert checkpoint.other_changes == len(others) > 100
    for layer in checkpoint.layers:
        name = f"{layer.name}.weight"
        base, tuned = before[name], after[name]
        if layer.kind == "embedding":
            # Its outputs are the dimensions of its vectors.
            base, tuned = base.T, tuned.T
        assert_is(layer, base, tuned, axis)


def test_scaling_a_model_turns_nothing(sd1_folder: Path, tuned_model: MakeModel) -> None:
    """By a power of two, which rounds nothing."""
    folder = tuned_model(lambda name, tensor: 2 * tensor if tensor.ndim > 1 else tensor)
    for axis in NORM_AXES:
        (run,) = analyze_weights(folder, sd1_folder, norm_axis=axis).runs
        for layer in run.checkpoints[0].layers:
            assert layer.delta_d < 1e-15, layer.name
            assert layer.relative_delta_m == pytest.approx(1, rel=1e-12)
        assert run.checkpoints[0].whole.relative_change == pytest.approx(1)


def test_reversing_channels_moves_no_magnitude(sd1_folder: Path, tuned_model: MakeModel) -> None:
    """The entries of each output channel in another order: its norm stays, its direction turns."""

    def change(name: str, tensor: Tensor) -> Tensor:
        is_query = name.endswith("to_q.weight")
        return tensor.flip(1).contiguous() if is_query else tensor

    folder = tuned_model(change)
    (run,) = analyze_weights(folder, sd1_folder, layers=["*.to_q", "*.to_k"]).runs
    (checkpoint,) = run.checkpoints
    assert len(checkpoint.layers) == checkpoint.unchanged > 10
    for layer in checkpoint.layers:
        assert layer.name.endswith("to_q")
        assert layer.relative_delta_m < 1e-15
        assert 0.1 < layer.delta_d < 2


def test_a_merged_model_is_what_its_adapter_is(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=5)
    adapter = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    merged = export_checkpoint(sd1_folder, adapter, tmp_path / "merged.safetensors")
    analysis = analyze_weights([adapter, tmp_path / "merged.safetensors"], sd1_folder)
    assert merged is not None
    of_adapter, of_model = (run.checkpoints[0] for run in analysis.runs)
    assert (of_adapter.method, of_model.method) == ("DoRA", "model")
    # Of a merged convolution 1x1 in a Linear's place, the same layer.
    assert [x.name for x in of_model.layers] == [x.name for x in of_adapter.layers]
    for one, other in zip(of_adapter.layers, of_model.layers, strict=True):
        assert other.delta_d == pytest.approx(one.delta_d, rel=1e-4)
        assert other.delta_m == pytest.approx(one.delta_m, rel=1e-4)


def test_a_run_is_all_its_checkpoints(sd1_folder: Path, run_folder: Path) -> None:
    counts = []
    analysis = analyze_weights(
        run_folder, sd1_folder, on_progress=lambda done, total: counts.append((done, total))
    )
    (run,) = analysis.runs
    assert (run.name, run.method) == ("run", "DoRA")
    # The result is the last checkpoint's.
    assert [c.label for c in run.checkpoints] == ["step 2", "step 10"]
    few, many = (checkpoint.whole for checkpoint in run.checkpoints)
    assert 0 < 4 * few.mean("delta_d") < many.mean("delta_d")
    layers = len(run.checkpoints[0].layers)
    assert counts == [(i, 2 * layers) for i in range(1, 2 * layers + 1)]
    # Stopped after its last checkpoint, it has a result of its own; without any, one alone.
    shutil.rmtree(run_folder / "checkpoint-10")
    (run,) = analyze_weights(run_folder, sd1_folder).runs
    assert [c.step for c in run.checkpoints] == [2, 10]
    (run_folder / "pytorch_lora_weights.safetensors").unlink()
    (run,) = analyze_weights(run_folder, sd1_folder).runs
    assert [c.step for c in run.checkpoints] == [2]


def test_runs_of_one_name_are_told_apart(sd1_folder: Path, run_folder: Path) -> None:
    other = shutil.copytree(run_folder, run_folder.parent / "other" / "run")
    analysis = analyze_weights([run_folder, other, run_folder / "checkpoint-2"], sd1_folder)
    assert [run.name for run in analysis.runs] == [str(run_folder), str(other), "checkpoint-2"]
    assert [run.checkpoints[0].step for run in analysis.runs] == [2, 2, 2]


def test_what_cannot_be_analyzed_is_refused(
    sd1_folder: Path, sd2_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="no run, adapter or model"):
        analyze_weights([], sd1_folder)
    with refused("norm_axis", "row"):
        analyze_weights(run_folder, sd1_folder, norm_axis="row")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"^run: no layer matches \*\.to_x; it has "):
        analyze_weights(run_folder, sd1_folder, layers=["*.to_x"])
    with pytest.raises(ExportError, match=r"no layer differs from the base's"):
        analyze_weights(sd1_folder, sd1_folder)
    with pytest.raises(ExportError, match=r"was not trained from .*: they differ in the layers"):
        analyze_weights(sd2_folder, sd1_folder)
    with pytest.raises(AdapterFormatError, match="made for Stable Diffusion 1"):
        analyze_weights(run_folder, sd2_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFormatError, match="no adapter file in it"):
        analyze_weights(tmp_path / "empty", sd1_folder)
    with pytest.raises(FileNotFoundError, match="there is no adapter at"):
        analyze_weights(tmp_path / "a.safetensors", sd1_folder)


def test_what_was_assumed_or_has_no_effect_is_said(
    sd1_folder: Path, run_folder: Path, tuned_model: MakeModel
) -> None:
    (run,) = analyze_weights(run_folder, sd1_folder, alpha=2).runs
    assert run.notes == ("alpha 2 has no effect: the file contains its own",)
    half = tuned_model(lambda name, tensor: (2 * tensor).half())
    (run,) = analyze_weights(half, sd1_folder, layers=["*.to_q"]).runs
    assert run.notes == ("stored as float16, unlike the base: rounding counts as change",)
