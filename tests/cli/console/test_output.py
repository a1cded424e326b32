"""Lines on a terminal, never on a progress bar's; rows of a report; and JSON for scripts."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

import pytest

from dora_diffusion.cli.console.errors import reporting_errors
from dora_diffusion.cli.console.output import (
    ProgressBar,
    print_rows,
    progress,
    say,
    tell,
    telling,
)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end: a return writes over what is there."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in re.sub(r"\x1b\[A", "", line).split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@contextlib.contextmanager
def terminal() -> Iterator[io.StringIO]:
    """Both streams on one screen."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


def test_lines_and_warnings_stand_above_the_bar():
    with terminal() as shown, reporting_errors("train", debug=False):
        bar = ProgressBar("step", desc="training")
        bar(3, 10)
        say("checkpoint: out/checkpoint-3")
        warnings.warn_explicit(
            "the disk is full", UserWarning, "x.py", 1, module="dora_diffusion.training.x"
        )
        bar(10, 10)
        bar.close()
    lines = screen(shown.getvalue())
    assert "checkpoint: out/checkpoint-3" in lines
    assert "warning: the disk is full" in lines
    (last,) = (line for line in lines if "10/10" in line)
    assert last.startswith("training: ")


def test_a_bar_begins_where_it_is_told():
    with terminal() as shown:
        bar = ProgressBar("image")
        bar(5, 8)
        bar(8, 8)
        bar.close()
    assert "5/8" in shown.getvalue()
    assert "0/8" not in shown.getvalue()


def test_who_listens_is_told_instead_of_a_bar():
    told = []
    with terminal() as shown:
        with telling(lambda **figures: told.append(figures)), progress("merging", "B") as show:
            show(3, 10)
            tell(address="https://hub")
        tell(phase="nobody listens any more")
        with progress("comparing", "layer") as show:
            show(1, 2)
    assert told == [
        {"phase": "merging", "unit": "B", "done": 0, "total": 0},
        {"done": 3, "total": 10},
        {"address": "https://hub"},
    ]
    assert "merging" not in shown.getvalue()
    assert "comparing" in shown.getvalue()


def test_who_listened_is_told_no_more_after_an_error():
    told = []
    with contextlib.suppress(ValueError), telling(lambda **figures: told.append(figures)):
        raise ValueError
    tell(done=1)
    assert told == []


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
