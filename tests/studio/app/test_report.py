"""The page's text for a bug report."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from dora_diffusion.studio.app import page as report
from dora_diffusion.studio.app.launch import Launch


def handler(launch: Launch) -> tuple[gr.Blocks, Callable[[], Any]]:
    context: Any = SimpleNamespace(launch=launch)
    with gr.Blocks() as blocks:
        report.add_report(context)
    (event,) = blocks.fns.values()
    assert [name for _, name in event.targets] == ["expand"]
    return blocks, event.fn


def test_it_is_made_when_it_is_opened_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(stdout=b"", stderr=b"Traceback: \xff")
    monkeypatch.setattr(report.subprocess, "run", lambda command, **_: done)
    blocks, describe = handler(Launch())
    assert describe() == "Traceback: \ufffd"
    done.stdout = b"dora-diffusion 1"
    assert describe() == "dora-diffusion 1"
    (field,) = (block for block in blocks.blocks.values() if isinstance(block, gr.Textbox))
    assert (field.value, field.buttons) == (None, ["copy"])
    assert field.show_label  # without it Gradio shows no button


def test_others_are_not_told_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: pytest.fail("told"))
    _, describe = handler(Launch(host="0.0.0.0", auth="ann:long enough"))
    with pytest.raises(
        gr.Error, match="its operator can call &#x27;dora-diffusion doctor&#x27; there"
    ):
        describe()
