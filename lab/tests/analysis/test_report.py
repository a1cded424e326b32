"""Every layer has its place in the model; tables, JSON and CSV say what was measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dora_diffusion.evaluation.statistics import Interval
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from lab.analysis import Analysis
from lab.analysis.decomposition import Decomposition
from lab.analysis.report import (
    FILES,
    KINDS,
    METHOD,
    PLACES,
    SCHEMA,
    CheckpointChange,
    LayerChange,
    RunChange,
    Spectrum,
    block_of,
    correlation,
    kind_of,
    model_order,
    place_of,
)

BLOCKS = [f"unet.{where}.resnets.{i}" for where in ("down_blocks.0", "up_blocks.1") for i in (0, 1)]


def layer(name: str, delta_m: float, delta_d: float, size: float = 1.0) -> LayerChange:
    """A layer whose channels have norm 2, and whose weight has norm 10."""
    parts = Decomposition(delta_m, delta_d, 2.0, size**2, 100.0)
    inner = Spectrum((0.5,), 1.0) if "conv1" in name else None
    return LayerChange(name, (4, 3, 3, 3), parts, Spectrum((size, size / 2), 1.5), inner)


def checkpoint(step: int | None, slope: float, seed: int = 0) -> CheckpointChange:
    """Layers whose direction follows their magnitude, with some noise."""
    generator = np.random.default_rng(seed)
    layers = []
    for block in BLOCKS:
        for part in ("conv1", "conv2", "time_emb_proj"):
            x = generator.uniform(1, 2)
            noise = generator.normal(0, 0.2)
            layers.append(layer(f"{block}.{part}", x, 5 + slope * x + noise, 1 + x))
    return CheckpointChange(step, "DoRA", layers, unchanged=3, other_changes=7)


@pytest.fixture
def analysis() -> Analysis:
    up = RunChange("up", [checkpoint(10, 1.0), checkpoint(20, 1.5, seed=1)])
    down = RunChange("down", [checkpoint(None, -1.0)], ("rounded",))
    return Analysis("base", "input", ("*",), [up, down])


def pairs(*checkpoints: CheckpointChange) -> np.ndarray:
    return np.array([(x.delta_m, x.delta_d) for c in checkpoints for x in c.layers])


def test_the_correlation_is_over_layers_and_checkpoints(analysis: Analysis) -> None:
    up, down = analysis.runs
    for run, sign in ((up, 1), (down, -1)):
        found = correlation(run.checkpoints)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        expected = np.corrcoef(pairs(*run.checkpoints).T)[0, 1]
        assert found.mean == pytest.approx(expected, abs=1e-12)
        assert found.n == 12 * len(run.checkpoints)
        assert found.low <= found.mean <= found.high
        assert sign * found.mean > 0.3
        # All channels have one norm here, so that relative changes correlate alike.
        relative = correlation(run.checkpoints, "relative_delta_m")
        assert relative is not None
        assert relative.mean == pytest.approx(found.mean, abs=1e-12)


def test_layers_of_one_block_are_no_independent_observations() -> None:
    """A layer named thrice within its block leaves the interval as it is."""
    once = checkpoint(1, 1.0)
    thrice = CheckpointChange(1, "DoRA", [x for x in once.layers for _ in range(3)])
    one, three = correlation([once]), correlation([thrice])
    assert one is not None
    assert three is not None
    assert (three.mean, three.low, three.high) == pytest.approx((one.mean, one.low, one.high))
    # Four blocks are what is drawn from, not twelve layers.
    apart = [
        layer(f"unet.down_blocks.9.resnets.{i}.conv1", x.delta_m, x.delta_d)
        for i, x in enumerate(once.layers)
    ]
    other = correlation([CheckpointChange(1, "DoRA", apart)])
    assert other is not None
    assert other.low != one.low


def test_shares_are_of_the_squared_change(analysis: Analysis) -> None:
    (last,) = analysis.runs[1].checkpoints
    groups = last.groups()
    assert [(g.place, g.kind, len(g.layers)) for g in groups] == [
        ("UNet down", "convolution", 6), ("UNet up", "convolution", 6),
    ]  # fmt: skip
    assert sum(group.share for group in groups) == pytest.approx(1)
    sizes = [sum(x.update.leading[0] ** 2 for x in group.layers) for group in groups]
    assert groups[0].share == pytest.approx(sizes[0] / sum(sizes))
    assert last.whole.relative_change == pytest.approx((sum(sizes) / 1200) ** 0.5)


def test_json_holds_every_figure(analysis: Analysis) -> None:
    report = json.loads(json.dumps(analysis.to_dict()))
    assert (report["schema"], report["base"], report["norm_axis"]) == (SCHEMA, "base", "input")
    up, down = report["runs"]
    assert down["notes"] == ["rounded"]
    first, last = up["checkpoints"]
    assert (first["step"], first["layers"], first["unchanged_layers"]) == (10, 12, 3)
    assert down["checkpoints"][0]["step"] is None
    source = analysis.runs[0].checkpoints[1]
    assert last["delta_m"] == pytest.approx(np.mean(pairs(source)[:, 0]))
    assert last["relative_delta_m"] == pytest.approx(last["delta_m"] / 2)
    assert Interval(**last["correlation"]) == correlation([source])
    assert Interval(**up["correlation"]) == correlation(analysis.runs[0].checkpoints)
    name = f"{BLOCKS[0]}.conv1"
    values = last["by_layer"][name]
    assert values["singular_values"] == list(source.layers[0].update.leading)
    assert values["low_rank"] == {"leading": [0.5], "effective_rank": 1.0}
    assert last["by_layer"][f"{BLOCKS[0]}.conv2"]["low_rank"] is None
    assert sum(group["share"] for group in last["groups"]) == pytest.approx(1)


def test_csv_has_a_row_for_each_layer(analysis: Analysis) -> None:
    rows = list(csv.DictReader(analysis.csv().splitlines()))
    assert len(rows) == 36
    assert [row["step"] for row in rows[::12]] == ["10", "20", ""]
    first = analysis.runs[0].checkpoints[0].layers[0]
    assert rows[0]["layer"] == first.name
    assert rows[0]["shape"] == "4x3x3x3"
    assert float(rows[0]["delta_d"]) == first.delta_d
    assert float(rows[0]["singular_value_2"]) == first.update.leading[1]
    assert not rows[0]["singular_value_3"]
    assert (rows[0]["low_rank_effective_rank"], rows[1]["low_rank_effective_rank"]) == ("1.0", "")


def test_the_tables_and_the_files(analysis: Analysis, tmp_path: Path) -> None:
    text = analysis.table()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[:3] for row in rows[2:6]] == [
        ["up (DoRA)", "step 10", "12"], ["up (DoRA)", "step 20", "12"],
        ["up (DoRA)", "all", ""], ["down (DoRA)", "result", "12"],
    ]  # fmt: skip
    assert METHOD in text
    assert "note: down: rounded" in text
    files = analysis.write(tmp_path)
    assert {path.name for path in files.values()} == set(FILES.values())
    assert json.loads(files["analysis"].read_text(encoding="utf-8")) == json.loads(
        json.dumps(analysis.to_dict())
    )
    assert files["layers"].read_text(encoding="utf-8") == analysis.csv()
    assert text in files["table"].read_text(encoding="utf-8")


UP = "unet.up_blocks.1.attentions.2"


@pytest.mark.parametrize(
    ("name", "shape", "place", "kind", "block"),
    [
        ("unet.conv_in", (8, 4, 3, 3), "UNet in and time", "convolution", "unet.conv_in"),
        ("unet.time_embedding.linear_1", (8, 4), "UNet in and time", "other",
         "unet.time_embedding.linear_1"),
        ("unet.down_blocks.0.resnets.1.conv1", (8, 8, 3, 3), "UNet down", "convolution",
         "unet.down_blocks.0.resnets.1"),
        ("unet.mid_block.attentions.0.proj_in", (8, 8), "UNet mid", "other",
         "unet.mid_block.attentions.0"),
        (f"{UP}.transformer_blocks.9.attn2.to_out.0", (8, 8), "UNet up", "attention", UP),
        (f"{UP}.transformer_blocks.0.ff.net.0.proj", (8, 8), "UNet up", "feed-forward", UP),
        ("unet.conv_out", (4, 8, 3, 3), "UNet out", "convolution", "unet.conv_out"),
        ("text_encoder.text_model.encoder.layers.11.self_attn.q_proj", (8, 8), "text encoder",
         "attention", "text_encoder.text_model.encoder.layers.11"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", (8, 8), "text encoder 2",
         "feed-forward", "text_encoder_2.text_model.encoder.layers.3"),
        ("text_encoder.text_model.embeddings.token_embedding", (9, 8), "text encoder", "embedding",
         "text_encoder.text_model.embeddings.token_embedding"),
    ],
)  # fmt: skip
def test_a_name_tells(name: str, shape: tuple[int, ...], place: str, kind: str, block: str) -> None:
    assert (place_of(name), kind_of(name, shape), block_of(name)) == (place, kind, block)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_layers_of_all_families_are_told_apart(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    with PipelineFolder.open(folder) as pipeline:
        shapes = module_shapes(pipeline)
    places = {place for place in PLACES if place.startswith(("text encoder", "UNet"))}
    assert {place_of(name) for name in shapes} == places - (
        set() if family == "sdxl" else {"text encoder 2"}
    )
    assert {kind_of(name, shape) for name, shape in shapes.items()} == set(KINDS)
    blocks = {block_of(name) for name in shapes if "attn" in name}
    assert len(blocks) >= 8
    ordered = sorted(shapes, key=model_order)
    places = [PLACES.index(place_of(name)) for name in ordered]
    assert places == sorted(places)


def test_numbers_are_ordered_as_numbers() -> None:
    names = [f"text_encoder.text_model.encoder.layers.{i}.mlp.fc1" for i in (10, 9, 1)]
    assert sorted(names, key=model_order) == names[::-1]
    embedding = "text_encoder.text_model.embeddings.token_embedding"
    assert sorted([*names, embedding], key=model_order)[0] == embedding
