"""Outputs that cannot be written are reported before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.__main__ import main


@pytest.mark.parametrize(
    ("line", "work"),
    [
        ("analyze RUN --base BASE --output OUT/a", "lab.analysis.analyze_weights"),
        ("compare --quick --output OUT", "lab.study.run.run_study"),
    ],
)
def test_a_file_in_place_of_the_folder_is_refused(
    line: str, work: str, trained: Path, sd1_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, last_line: Callable[[], str],
) -> None:  # fmt: skip
    def started(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(work, started)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine", encoding="utf-8")
    places = {"RUN": trained, "BASE": sd1_folder, "OUT": in_the_way}
    for name, place in places.items():
        line = line.replace(name, str(place))
    assert main(line.split()) == 1
    assert last_line() == f"error: {in_the_way}: is not a folder; give another output"
    assert in_the_way.read_text(encoding="utf-8") == "mine"
