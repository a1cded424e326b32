"""Several adapters in one: the identity, exact sums, and the nearest of a smaller rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dora_diffusion.export import (
    ExportError,
    combine_adapters,
    convert_adapter,
    export_checkpoint,
    inspect_adapter,
    verify_checkpoint,
)
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.export.helpers import MakeAdapter, tensors_of


def written(
    path: Path, folder: Path, random_adapter: MakeAdapter, **changes: object
) -> tuple[Path, dict[str, LayerWeights]]:
    """An adapter in a kohya file, and its layers as the file holds them."""
    layers = random_adapter(folder, **{"every": 7, **changes})
    facts = AdapterMetadata("sd1", trigger=path.stem, tags=(path.stem,), resolutions=(64,))
    file = write_adapter(path, AdapterFile(layers, facts), "kohya")
    return file, read_adapter(file).layers


def summed(
    folder: Path, parts: list[tuple[dict[str, LayerWeights], float]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Base and ``W + sum_k s_k (W'_k - W)`` of each adapted module, in float64."""
    weights, result = tensors_of(folder), {}
    for name in {name for layers, _ in parts for name in layers}:
        base = weights[f"{name}.weight"].double()
        total = base.clone()
        for layers, strength in parts:
            if name in layers:
                total += strength * (merge_tensor(base, [(layers[name], Strengths())]) - base)
        result[name] = base, total
    return result


@pytest.mark.parametrize(
    "axes", [("output", "output"), ("input", "input"), ("output", None), (None, None)], ids=str
)
def test_a_sum_is_exact_where_the_rank_is_the_sum_of_theirs(
    tmp_path: Path, sd1_folder: Path, axes: tuple[str | None, ...], random_adapter: MakeAdapter
) -> None:
    """Layers of both adapters and of one alone, with a negative strength; one DoRA for all."""
    parts = [
        written(
            tmp_path / f"{place}.safetensors", sd1_folder, random_adapter,
            seed=place, every=7 + 2 * place, axis=axis, mixed_ranks=True,
        )
        for place, axis in enumerate(axes)
    ]  # fmt: skip
    strengths = (0.7, -0.4)
    report = combine_adapters(
        sd1_folder,
        [(file, strength) for (file, _), strength in zip(parts, strengths, strict=True)],
        tmp_path / "sum.safetensors",
    )
    found = read_adapter(report.path).layers
    both = [(layers, strength) for (_, layers), strength in zip(parts, strengths, strict=True)]
    expected = summed(sd1_folder, both)
    assert found.keys() == expected.keys()
    for name, (base, total) in expected.items():
        got = merge_tensor(base, [(found[name], Strengths())])
        assert ((got - total).norm() / total.norm()).item() < 1e-6, name
        assert found[name].norm_axis == (axes[0] or "output")
        assert found[name].magnitude is not None
        ranks = sum(layers[name].rank for layers, _ in both if name in layers)
        assert found[name].rank <= ranks
    assert max(report.errors.values()) < 1e-5
    facts = read_adapter(report.path).metadata
    assert (facts.trigger, facts.tags) == ("0, 1", ("0", "1"))
    assert facts.extra["combined"] == "0.safetensors:0.7, 1.safetensors:-0.4"


def test_a_smaller_rank_states_its_error(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """By NumPy; never farther than the truncated SVD of the sum; magnitudes on both axes mixed."""
    first, second = (
        written(tmp_path / f"{axis}.safetensors", sd1_folder, random_adapter, axis=axis)
        for axis in ("output", "input")
    )
    pairs = [(first[0], 1.0), (second[0], 0.5)]
    report = combine_adapters(sd1_folder, pairs, tmp_path / "sum", FitSettings(rank=3))
    found = read_adapter(report.path).layers
    for name, (base, total) in summed(sd1_folder, [(first[1], 1.0), (second[1], 0.5)]).items():
        got = merge_tensor(base, [(found[name], Strengths())])
        change = (total - base).flatten(1).numpy()
        error = np.linalg.norm((got - total).flatten(1).numpy()) / np.linalg.norm(change)
        s = np.linalg.svd(change, compute_uv=False)
        assert report.errors[name] == pytest.approx(error, rel=1e-3), name
        assert error < np.linalg.norm(s[3:]) / np.linalg.norm(s), name
        assert found[name].rank == 3
    said = f"exact for this DoRA, which is off the sum of the adapters by {report.total_error:.1%}"
    assert inspect_adapter(report.path).tools["diffusers"] == said
    merged = export_checkpoint(sd1_folder, report.path, tmp_path / "merged.safetensors")
    assert verify_checkpoint(merged, sd1_folder, report.path).ok


def test_refusals(tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter) -> None:
    file, _ = written(tmp_path / "a.safetensors", sd1_folder, random_adapter)
    other = write_adapter(tmp_path / "peft", read_adapter(file), "peft")
    output = tmp_path / "b.safetensors"
    for adapters, changes, reason in (
        ([], {}, "no adapter was given"),
        ([(file, 0.0)], {}, "these adapters have no effect at these strengths"),
        ([(file, 1.0), (file, -1.0)], {}, "cancel each other; change a strength"),
        ([(file, 1.0), (file, 0.3), (other, -1.3)], {}, "cancel each other; change a strength"),
        ([(file, float("inf"))], {}, "the strength of .* is inf; it must be between"),
        (file, {"output": file, "overwrite": True}, "contains the input"),
        (file, {"fit": FitSettings(norm_axis="input"), "key_format": "diffusers"},
         "cannot store magnitudes"),
    ):  # fmt: skip
        arguments = {"output": output, **changes}
        with pytest.raises(ValueError, match=reason):
            combine_adapters(sd1_folder, adapters, **arguments)
    assert not output.exists()


def test_layers_that_cancel_are_said_and_not_written(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Of two adapters with some layers in common; the difference is of the others."""
    file, layers = written(tmp_path / "a.safetensors", sd1_folder, random_adapter)
    name = next(iter(layers))
    facts = AdapterMetadata("sd1")
    one = write_adapter(tmp_path / "one.safetensors", AdapterFile({name: layers[name]}, facts))
    report = combine_adapters(sd1_folder, [(file, 1.0), (one, -1.0)], tmp_path / "b.safetensors")
    assert "without effect at these strengths and left out of the result: 1 layer" in report.notes
    assert read_adapter(report.path).layers.keys() == layers.keys() - {name}
    # A change that is small is none that cancels.
    report = combine_adapters(sd1_folder, [(file, 1.0), (one, -0.999)], tmp_path / "c.safetensors")
    assert read_adapter(report.path).layers.keys() == layers.keys()
    assert report.total_error < 1e-3


VECTORS = {"<s1>": torch.arange(32.0), "<s2>": torch.arange(64.0).reshape(2, 32) / 64}


def with_token(
    path: Path, folder: Path, random_adapter: MakeAdapter, token: str, vectors: torch.Tensor
) -> Path:
    layers = random_adapter(folder, every=20)
    facts = AdapterMetadata("sd1", trigger=f"{token} dog")
    tokens = {token: {"text_encoder": vectors}}
    return write_adapter(path, AdapterFile(layers, facts, tokens=tokens), "kohya")


def test_trained_tokens_of_all_adapters_are_kept(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Bit for bit, at any strength; one that two adapters share with equal vectors is one."""
    files = [
        with_token(tmp_path / name, sd1_folder, random_adapter, token, VECTORS[token])
        for name, token in (("a.safetensors", "<s1>"), ("b.safetensors", "<s2>"),
                            ("c.safetensors", "<s1>"))
    ]  # fmt: skip
    pairs = [(file, 0.5) for file in files]
    report = combine_adapters(sd1_folder, pairs, tmp_path / "out" / "both.safetensors")
    embeddings = tmp_path / "out" / "embeddings"
    assert report.embeddings == {
        "<s1>": embeddings / "both_s1.safetensors", "<s2>": embeddings / "both_s2.safetensors",
    }  # fmt: skip
    assert "copy its file to embeddings" in report.notes[-1]
    both = read_adapter(report.path)
    assert both.tokens.keys() == VECTORS.keys()
    for token, vectors in VECTORS.items():
        assert torch.equal(both.tokens[token]["text_encoder"].view_as(vectors), vectors)
    assert both.metadata.trigger == "<s1> dog, <s2> dog"
    with pytest.raises(ExportError, match=r"both.*exists"):
        combine_adapters(sd1_folder, pairs, tmp_path / "out" / "both.safetensors")


def test_a_token_with_two_meanings_is_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """The advice of the message helps."""
    pairs = [
        (with_token(tmp_path / name, sd1_folder, random_adapter, "<s1>", vectors), 1.0)
        for name, vectors in (("a.safetensors", torch.zeros(32)), ("b.safetensors", torch.ones(32)))
    ]
    output = tmp_path / "out" / "both.safetensors"
    with pytest.raises(ExportError, match=r"different vectors for <s1>.*convert one"):
        combine_adapters(sd1_folder, pairs, output)
    assert not output.parent.exists()
    other = convert_adapter(pairs[1][0], tmp_path / "c.safetensors", "diffusers")
    other.embeddings["<s1>"].unlink()
    report = combine_adapters(sd1_folder, [pairs[0], (other.path, 1.0)], output)
    assert not read_adapter(report.path).tokens["<s1>"]["text_encoder"].any()
    assert any("c_s1.safetensors is not next to it" in note for note in report.notes)
