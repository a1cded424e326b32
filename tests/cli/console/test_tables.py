"""Rows of a report, wrapped to the terminal, and JSON for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_diffusion.cli.console.tables import print_json, print_rows, rows_text


def test_texts_stand_in_one_column_and_wrap_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_rows([("rank", "8"), ("", ""), ("base model", "word " * 12)])
    assert capsys.readouterr().out.splitlines() == [
        "rank        8",
        "",
        "base model  word word word word word word word word word",
        "            word word word",
    ]


def test_a_narrow_terminal_still_gets_forty_columns_of_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    print_rows([("note", "x" * 40)])
    assert capsys.readouterr().out == f"note  {'x' * 40}\n"


def test_what_json_does_not_have_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"path": Path("a/b"), "error": 0.5})
    assert json.loads(capsys.readouterr().out) == {"path": "a/b", "error": 0.5}


def test_rows_as_text_are_not_wrapped_and_say_a_name_once():
    rows = [("a", "x " * 99), ("device", "1"), ("device", "2"), ("a", "3")]
    assert rows_text(rows) == f"a       {'x ' * 99}\ndevice  1\n        2\na       3"
