"""Errors of handlers, as the page shows them."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from dora_diffusion.studio.app.context import plain
from dora_diffusion.studio.jobs.store import Withdrawn


def shown(error: Exception) -> str:
    @plain
    def handler() -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        handler()
    return str(caught.value.message)


def test_what_its_user_took_back_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    monkeypatch.setattr(gr, "Info", lambda text, title: told.append(text))

    @plain
    def handler() -> None:
        raise Withdrawn("the images were withdrawn")

    assert handler() == gr.skip()
    assert told == ["The images were withdrawn"]


def test_a_defect_asks_for_a_report_and_tells_its_details_on_the_server_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(TypeError("in /srv/private"))
    assert text.startswith("Unexpected TypeError; this is a bug: please report it with the ")
    assert "the output of `dora-diffusion doctor`" in text
    assert "private" not in text
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: unexpected TypeError: in /srv/private; this is a bug: ")
