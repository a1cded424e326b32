"""The checkpoint that a comparison suggests, and what of it is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_diffusion.evaluation.ranking import RankedCheckpoint, Ranking

IMAGES = (Path("gone.png"), Path("gone-others.png"))


def row(step: int, each: tuple[float, ...], drift: float | None) -> RankedCheckpoint:
    name = f"checkpoint-{step}" if step else "base"
    return RankedCheckpoint(
        name, sum(each) / len(each) if each else None, drift, IMAGES, each, step
    )


def test_the_suggestion_weighs_likeness_against_drift() -> None:
    rows = (
        row(0, (0.2, 0.21, 0.19), 0.0),
        row(50, (0.5, 0.51, 0.5), 0.0),
        row(100, (0.8, 0.79, 0.81), 0.1),
        row(150, (0.9, 0.9, 0.91), 0.3),
    )
    found = Ranking(rows, (), ())
    assert (found.suggested, found.verdict) == ("checkpoint-100", "")
    assert Ranking((row(0, (), 0.0), row(50, (), 0.1)), (), ()).suggested == ""


def test_where_nothing_was_learned_nothing_is_suggested_and_it_is_said() -> None:
    base = (0.18, 0.20, 0.16, 0.22, 0.14)
    little = (0.19, 0.18, 0.20, 0.20, 0.18)  # means 0.19 and 0.18
    found = Ranking((row(0, base, 0.0), row(50, little, 0.0), row(100, base, 0.1)), (), ())
    assert found.suggested == ""
    # By hand: differences 0.01, -0.02, 0.04, -0.02, 0.04; t(4, 97.5%) = 2.776.
    differences = torch.tensor([0.01, -0.02, 0.04, -0.02, 0.04], dtype=torch.float64)
    half = 2.7764451 * float(differences.std()) / 5**0.5
    gain = found.gain(found.rows[1])
    assert gain is not None
    assert (gain.low, gain.high) == (pytest.approx(0.01 - half), pytest.approx(0.01 + half))
    assert (
        "None of these checkpoints is more like the subject than the base model: the best, step 50,"
        f" differs by +0.01 (95% confidence interval {0.01 - half:+.2f} to {0.01 + half:+.2f}, 5 im"
    ) in found.verdict
    from dora_diffusion.studio.app.views.run import _cards

    job: Any = SimpleNamespace(stands="", step_of=lambda name: 50)
    page = _cards(job, dataclasses.replace(found, similar_to="training photos"), None)
    assert "None of these checkpoints" in page
    assert "suggested" not in page.lower()
    assert "similarity to training photos" in page
