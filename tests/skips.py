"""Reasons of skipped tests, and where they run: the table of docs/contributing/tests.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "contributing" / "tests.md"


def places() -> dict[str, str]:
    """Places where each reason's tests run, by the table's reasons, in its order."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Skips\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {one: place for reasons, place in rows[1:] for one in reasons.split(" / ")}


def row_of(reason: str, rows: Iterable[str]) -> str | None:
    """The first row that a reason belongs to."""

    def is_it(row: str) -> bool:
        parts = [re.escape(part) for part in row.split("...")]
        return re.fullmatch(".*".join(parts), reason, re.DOTALL) is not None

    return next(filter(is_it, rows), None)


def summary(reasons: Iterable[str]) -> list[str]:
    """A line for each reason of a run: how often, why, and where else."""
    known = places()
    return [
        f"{count} skipped: {reason}; runs in {known.get(row_of(reason, known) or '', '?')}"
        for reason, count in Counter(reasons).most_common()
    ]
