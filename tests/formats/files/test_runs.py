"""Names that are made from users' words are names on every file system."""

from __future__ import annotations

import doctest
from pathlib import Path

import platformdirs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_diffusion import system
from dora_diffusion.formats.files import runs
from dora_diffusion.formats.files.runs import file_stem, runs_folder
from tests.portable.windows import is_name


def test_the_documented_examples_are_true() -> None:
    assert doctest.testmod(runs).failed == 0


@given(st.text())
@example("a" * 59 + " b")
@example("COM1")
@example("nul.")
@example("..")
@example("Ünïcode / with: spaces ")
def test_whatever_the_words_are_it_is_a_name_on_windows(words: str) -> None:
    stem = file_stem(words, "subject")
    assert is_name(stem)
    assert is_name(f"{stem}.safetensors")
    assert stem == stem.lower()
    assert 1 <= len(stem) <= 60


def test_runs_lie_where_the_app_is_started_and_on_windows_with_the_users_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == Path("runs")
    monkeypatch.setattr(system, "is_windows", lambda: True)
    monkeypatch.setattr(
        platformdirs, "user_data_dir", lambda name, appauthor: f"AppData/Local/{name}"
    )
    assert runs_folder() == Path("AppData/Local/dora-diffusion/runs")
    (tmp_path / "runs").mkdir()
    assert runs_folder() == Path("runs"), "runs that are there are not left behind"
