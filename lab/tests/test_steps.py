"""Steps until a likeness: by hand, and that the page has what `benchmarks/steps.py` prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "lab" / "measurements"
steps = runpy.run_path(str(ROOT / "benchmarks" / "steps.py"), run_name="steps")


def record(row: str, subject: str, similarity: float, loss: float) -> dict[str, object]:
    return {
        "row": row, "method": row, "subject": subject,
        "measures": {"subject_similarity": similarity, "others_loss": loss},
    }  # fmt: skip


def test_the_page_has_the_tables_of_its_records():
    text = (MEASUREMENTS / "steps.md").read_text(encoding="utf-8")
    tables = steps["tables"](MEASUREMENTS)
    assert len(tables) == 4
    assert [table for table in tables if table not in text] == []


def test_a_curve_starts_at_the_base_and_is_interpolated_between_its_rows():
    series = steps["curves"]([
        record("base", "mug", 0.0, 0.125), record("usual-10", "mug", 0.5, 0.25),
        record("usual-20", "mug", 0.75, 0.375), record("batch-1-30", "mug", 0.5, 0.5),
    ])  # fmt: skip
    curve = {0: (0.0, 0.0), 10: (0.5, 0.125), 20: (0.75, 0.25)}
    assert series == {"usual": {"mug": curve}, "batch-1": {"mug": {0: curve[0], 30: (0.5, 0.375)}}}
    reached = {
        similarity: steps["steps_to"](curve, similarity) for similarity in (0.25, 0.625, 0.8)
    }
    assert reached == {0.25: 5, 0.625: 15, 0.8: None}


@pytest.mark.parametrize(
    ("steps_of", "cells"),
    [
        ([25.0, 25.0], ["25 (25 to 25)", "0.50 [0.50, 0.50]", "-0.50 [-0.50, -0.50]"]),
        ([12.5, 50.0], ["25 (12 to 50)", "0.50 [0.25, 1.00]", "-0.50 [-1.00, +0.00]"]),
        ([100.0], ["100 (100 to 100)", "2.00", "+0.50"]),
    ],
)
def test_the_exponent_of_a_setting_that_is_four_times_as_high(steps_of, cells):
    given = dict(zip("ab", steps_of, strict=False))
    assert steps["ratio_cells"](given, dict.fromkeys(given, 50.0), 4.0) == cells
