"""The clock sends what is new to a page, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.app.page import _changes, read_again_if_deleted


def test_only_what_changed_is_made_and_sent() -> None:
    made: list[str] = []

    def part(mark: str) -> Any:
        return mark, lambda: made.append(mark) or f"made {mark}"

    names = ["text", "field"]
    seen, *updates = _changes({}, {"text": "", "field": part("a"), "other": 1}, names)
    assert updates == ["", "made a"]  # an empty text is new to a new page
    again, *updates = _changes(seen, {"text": "", "field": part("a")}, names)
    assert updates == [gradio.skip()] * 2
    assert again == seen == {"text": "", "field": "a"}
    _, *updates = _changes(seen, {"text": "x", "field": part("b")}, names)
    assert updates == ["x", "made b"]
    assert made == ["a", "b"]


def test_a_refresh_reads_again_where_a_run_is_deleted_while_it_reads() -> None:
    gone = [FileNotFoundError("samples/step-1.png"), FileNotFoundError("log.txt")]

    def read(known: int) -> int:
        if gone:
            raise gone.pop()
        return known + 1

    assert read_again_if_deleted(read)(1) == 2
    gone = [FileNotFoundError("runs")] * 9  # Not for ever: it may be something else that is gone.
    with pytest.raises(FileNotFoundError):
        read_again_if_deleted(read)(1)
