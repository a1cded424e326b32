"""Fields over things that are deleted."""

from __future__ import annotations

import pytest

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.ui import choosing
from dora_diffusion.studio.jobs.store import GONE
from tests.studio.app.views.helpers import pressed, triggers

pytest.importorskip("gradio", reason="gradio is not installed")


def test_a_choice_that_the_page_shows_is_left_to_whoever_chooses() -> None:
    choices = [("a", "1"), ("b", "2")]
    for shown, sent in (("1", {}), ("2", {}), (None, {"value": "1"}), ("3", {}), (["2", "3"], {})):
        mark, make = choosing(choices, shown, "1", known=["3"], visible=True)
        assert mark == {"choices": choices, "visible": True} | sent
        assert ("value" in make()) is bool(sent)


def test_a_choice_that_is_gone_is_empty_with_its_reason_until_another_is_chosen() -> None:
    choices, gone = [("a", "1"), ("b", "2")], (GONE, GONE)
    for shown, sent in (
        ("9", {"value": GONE}),
        (GONE, {}),
        (["2", "9", "8"], {"value": ["2", GONE]}),
        (["2", GONE], {}),
    ):
        assert choosing(choices, shown, "1")[0] == {"choices": [gone, *choices]} | sent
    # No object may be a choice too, which is left alone.
    assert choosing([("none", ""), *choices], "")[0] == {"choices": [("none", ""), *choices]}
    # With nothing to choose it is empty.
    assert choosing([], "9")[0] == {"choices": [], "value": None}


def test_what_is_pressed_sets_off_its_handler(context: Context) -> None:
    """Of handlers that other tests call by their names."""
    wired = {
        ("upload", "subject"): {("upload", "upload")},
        ("start", "train"): {("start", "click")},
        ("load_settings", "train"): {("settings-upload", "upload")},
        ("start", "run"): {("rank-checkpoints", "click")},
        ("click", "run"): {("checkpoints", "click")},
        ("rename", "run"): {("rename", "click"), ("run-name", "submit")},
        ("make", "generate"): {("make", "click")},
        ("compare", "generate"): {("side-by-side", "click")},
        ("make_grid", "generate"): {("grid", "click")},
        ("load", "generate"): {("load-png", "upload")},
        ("withdraw", "generate"): {("turn", "click")},
        ("stop", "library"): {("tasks", "click")},
        ("card", "library"): {("convert", "click")},
        ("convert", "library"): {("convert", "click")},
        ("merge", "library"): {("export", "click")},
    }
    assert {key: triggers(context, *key) for key in wired} == wired
    # Handlers of one name: each by its button.
    run = ["stop", "resume", "save-now", "sample-now", "continue", "remove"]
    assert {(name, "click") for name in run} <= triggers(context, "run", "run")
    assert len({pressed(context, name) for name in run[1:]}) == len(run) - 1
