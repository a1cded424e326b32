"""What a terminal shows: every line of ours on a line of its own, never on a progress bar's."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

from dora_diffusion.console.errors import reporting_errors
from dora_diffusion.console.progress import ProgressBar, say


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


def test_without_a_bar_a_line_is_a_line():
    with terminal() as shown:
        say("done")
    assert shown.getvalue() == "done\n"
