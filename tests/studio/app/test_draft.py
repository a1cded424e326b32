"""Draft of the page that the browser keeps, and what of it is believed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.page import can_hold, kept_fields
from dora_diffusion.studio.app.settings import ADVANCED, LABELS
from dora_diffusion.studio.app.views.ui import LIMIT
from dora_diffusion.studio.jobs.store import GONE
from dora_diffusion.studio.jobs.subjects import new_subject
from tests.studio.app.views.helpers import built_page
from tests.studio.jobs.helpers import ended_run


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    return built_page(Context(Launch(runs_dir=tmp_path_factory.mktemp("draft") / "runs")))


def test_every_field_of_the_page_is_kept_under_a_name_of_its_own(blocks: gr.Blocks) -> None:
    kept = kept_fields(blocks)
    inputs = {
        one["id"] for one in blocks.config["components"]
        if one["type"] in {"textbox", "number", "slider", "checkbox", "checkboxgroup", "radio",
                           "dropdown"}
        and one["props"].get("interactive") is not False
    }  # fmt: skip
    assert {field._id for field in kept.values()} == inputs
    assert {f"train/{LABELS.get(name, name)}" for name in ADVANCED} < set(kept)
    tabs = {name.partition("/")[0] for name in kept}
    assert tabs == {"subject", "train", "generate", "library"}


FIELDS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "text": (gr.Textbox(max_length=5), ["", "abcde"], ["abcdef", 3, None, ["a"]]),
    "long text": (gr.Textbox(), ["x" * LIMIT], ["x" * (LIMIT + 1)]),
    "number": (gr.Number(minimum=1), [1, 2.5], [0, "1", True, None]),
    "slider": (gr.Slider(0, 2), [-0.1, 0, 2, 2.1], ["1", False, None]),
    "box": (gr.Checkbox(), [True, False], ["yes", 1, None]),
    "boxes": (gr.CheckboxGroup(["a", "b"]), [[], ["a", "b"]], [["c"], "a", [1], None]),
    "radio": (gr.Radio(["a", "b"]), ["a"], ["c", "", None, ["a"]]),
    "choice": (gr.Dropdown([("A", "a"), ("none", "")]), ["a", ""], ["A", "b", 1, ["a"], None]),
    "own choice": (gr.Dropdown(["a"], allow_custom_value=True), ["a", "x/y"], [1, None]),
    "ids": (gr.Dropdown([]), ["20261126-030405-abcdef"], [["a"], 3, None]),
    "several": (gr.Dropdown(["a", "b"], multiselect=True), [[], ["b"]], ["a", ["c"], None]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_only_values_that_a_field_can_have_are_believed(name: str) -> None:
    field, good, bad = FIELDS[name]
    assert [value for value in good + bad if can_hold(field, value)] == good


def restoring(blocks: gr.Blocks) -> Any:
    """The handler that fills the fields when the page is loaded."""
    [one] = [one for one in blocks.fns.values() if getattr(one.fn, "__name__", "") == "restore"]
    return one


def test_what_was_kept_is_filled_in_again(blocks: gr.Blocks) -> None:
    dependency = restoring(blocks)
    there = next(field.value for field in dependency.outputs if field.label == "Steps")
    updates = dependency.fn({"train/rank": "17", "generate/Seed": 5, "generate/Steps": there})
    values = {
        field.label: update["value"]
        for field, update in zip(dependency.outputs, updates, strict=True)
        if "value" in update
    }
    assert values == {"rank": "17", "Seed": 5}


def opened(blocks: gr.Blocks, kept: dict[str, Any], query: dict[str, str]) -> dict[Any, Any]:
    """The tab, and values by field, of a page that is loaded with an address."""
    restore = restoring(blocks)
    updates = restore.fn(kept, SimpleNamespace(query_params=query))
    return {
        field: update.selected if isinstance(update, gr.Tabs) else update["value"]
        for field, update in zip(restore.outputs, updates, strict=True)
        if update != gr.skip()
    }


def test_an_address_names_what_is_selected_and_what_is_gone_is_left_out(tmp_path: Path) -> None:
    context = Context(Launch(runs_dir=tmp_path / "runs"))
    workspace, blocks = context.workspace, built_page(context)
    first, second = (ended_run(workspace, (2,), 2).id for _ in range(2))
    subjects = [new_subject(workspace, title) for title in ("Mug", "Cat")]
    context.jobs(fresh=True)
    pairs = {
        "subject": subjects, "run": [first, second], "library": [first, second],
        "adapter": [f"{first}/checkpoint-2", second],
    }  # fmt: skip
    labels = {"subject": "subject/Subject", "run": "train/Run", "library": "library/Run",
              "adapter": "generate/Run or checkpoint"}  # fmt: skip
    fields = {name: kept_fields(blocks)[label] for name, label in labels.items()}
    gone = ("20260101-000000-abcdef", GONE, "../x", "")
    for name, (one, other) in pairs.items():

        def shown(query: str | None, kept: Any, name: str = name) -> Any:
            address = {} if query is None else {name: query}
            values = opened(blocks, {labels[name]: kept}, address)
            assert set(values) <= {fields[name]}
            return values.get(fields[name])

        assert [shown(one, None), shown(other, None), shown(None, one)] == [one, other, one]
        assert shown(one, other) == one  # Another window's choice is in the draft.
        assert [shown(value, other) for value in gone] == [other] * 4
        assert [shown(None, value) for value in (*gone, [one], 3)] == [None] * 6
        assert [shown(value, value) for value in gone] == [None] * 4
        # Each choice is written there.
        [js] = [
            one.js for one in blocks.fns.values()
            if (fields[name]._id, "change") in one.targets and "locate" in str(one.js)
        ]  # fmt: skip
        assert js.startswith(f"(id) => studio.locate('{name}', ")
    assert opened(blocks, {}, {name: pair[0] for name, pair in pairs.items()}) == {
        fields[name]: pair[0] for name, pair in pairs.items()
    }
