"""Names, groups and intervals of figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.evaluation.measures import (
    MEASURES,
    Scores,
    difference,
    mean_distances,
    summarize,
    title_of,
)
from dora_diffusion.evaluation.report import Evaluation, sheet, shown
from dora_diffusion.evaluation.statistics import Interval


def test_distances_are_those_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.rand(6, 5, generator=generator), dim=1)
    groups = ["a", "b", "a", "a", "b", "c"]
    for cosine in (True, False):
        found = mean_distances(rows, groups, cosine=cosine)
        for i, group in enumerate(groups):
            others = [j for j, g in enumerate(groups) if g == group and j != i]
            array = rows.double().numpy()
            wanted = [
                1 - array[i] @ array[j] if cosine else np.sqrt(np.mean((array[i] - array[j]) ** 2))
                for j in others
            ]
            assert found[i] == pytest.approx(np.mean(wanted) if wanted else 0, abs=1e-5)


def test_scores_are_kept_by_round_and_group() -> None:
    scores = Scores(["subject", "others", "subject", "subject"], [0, 0, 1, 1])
    scores.add("background", "subject", [True, False, False, None])
    scores.add("side", "pose", [1, 1, 1, 1])
    assert scores.values == {"background": ((1.0,), (0.0,))}


def test_shares_and_means_have_their_intervals() -> None:
    share = summarize("background", ((1, 1, 0), (1, 1, 1)))
    assert (share.method, share.n, share.mean) == ("wilson", 6, 5 / 6)
    mean = summarize("subject_similarity@dino", ((0.2, 0.4), (0.6, 0.8)))
    assert (mean.method, mean.n, mean.mean) == ("t", 4, pytest.approx(0.5))
    # Paired: the spread of the pictures cancels.
    moved = difference("denoising_loss", ((1.1, 2.1), (3.1, 4.1)), ((1, 2), (3, 4)))
    assert moved.low == pytest.approx(0.1)
    assert difference("background", ((1,),), ((0,),)).method == "newcombe"
    assert title_of("subject_similarity@dino") == "subject similarity (dino)"


@pytest.mark.parametrize(
    ("interval", "is_share", "signed", "text"),
    [
        (None, False, False, "-"),
        (Interval(0.834, 0.8, 0.87, 9, "t"), False, False, "0.83 [0.80, 0.87]"),
        (Interval(0.95, 0.834, 0.99, 9, "wilson"), True, False, "95% [83, 99]"),
        (Interval(-0.05, -0.2, 0.1, 9, "newcombe"), True, True, "-5 [-20, +10]"),
        (Interval(0.0123, 0.01, 0.02, 9, "t"), False, True, "+0.0123 [+0.0100, +0.0200]"),
        (Interval(0.5, None, None, 1, "t"), False, False, "0.50"),
    ],
)
def test_figures_are_shown_with_their_intervals(interval, is_share, signed, text) -> None:
    assert shown(interval, is_share, signed=signed) == text


@pytest.fixture
def evaluation() -> Evaluation:
    columns = {
        "base": {"background": ((1, 0), (1, 1)), "denoising_loss": ((0.3, 0.2), (0.4, 0.3))},
        "adapted": {"background": ((1, 1), (1, 1)), "denoising_loss": ((0.2, 0.1), (0.3, 0.2))},
        "truth": {"background": ((1, 1), (1, 1))},
    }
    pictures = {name: [Image.new("RGB", (8, 8), name)] * 3 for name in ("red", "blue")}
    return Evaluation(
        "mug", columns, (0, 1), pictures, ["a", "b", "c"], ("likeness: no model",), {"base": "x"}
    )


def test_the_json_says_everything(evaluation: Evaluation, tmp_path: Path) -> None:
    files = evaluation.write(tmp_path)
    report = json.loads(files["scores"].read_text())
    assert (report["schema"], report["subject"], report["base"]) == (1, "mug", "x")
    assert report["seeds"] == [0, 1]
    background = report["measures"]["background"]
    assert background["kind"] == "share"
    assert background["base"]["mean"] == 0.75
    assert background["change"]["mean"] == 0.25
    assert background["per_seed"] == {"base": [0.5, 1], "adapted": [1, 1], "truth": [1, 1]}
    loss = report["measures"]["denoising_loss"]
    assert loss["change"]["mean"] == pytest.approx(-0.1)
    assert loss["truth"] is None
    for interval in (background["adapted"], loss["change"]):
        assert interval.keys() == {"mean", "low", "high", "n", "method"}
    assert report["notes"] == ["likeness: no model"]
    table = files["table"].read_text()
    assert "| place as asked" in table
    assert "not measured: likeness" in table
    with Image.open(files["images"]) as picture:
        assert picture.width > 3 * 112


def test_a_sheet_breaks_into_bands() -> None:
    rows = {"base": [Image.new("RGB", (9, 7), "red")] * 5}
    one, two = sheet(rows, ["x"] * 5, columns=5), sheet(rows, ["x"] * 5, columns=3)
    assert (one.width > two.width, two.height) == (True, 2 * one.height)
    assert (np.asarray(one) == (255, 0, 0)).all(-1).sum() > 5 * 100 * 100


def test_every_measure_is_explained_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for measure in MEASURES.values():
        assert measure.title in manual


@pytest.mark.parametrize("dimensions", [1, 48])
def test_intervals_of_diversity_hold_what_they_promise(dimensions):
    """Over 300 evaluations of 10 prompts and 4 seeds, nine in ten at least hold the truth."""
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 20_000, dimensions))
    truth = np.sqrt(((first - second) ** 2).sum(1)).mean() / np.sqrt(dimensions)
    keys = list(range(10)) * 4
    held = 0
    for _ in range(300):
        pictures = torch.tensor(generator.standard_normal((40, dimensions)), dtype=torch.float32)
        distances = mean_distances(pictures, keys, cosine=False)
        rounds = tuple(tuple(distances[start : start + 10]) for start in range(0, 40, 10))
        interval = summarize("diversity_pixels", rounds)
        assert interval.mean == pytest.approx(np.mean(distances))
        held += interval.low <= truth <= interval.high
    assert held / 300 > 0.9
