"""Draft of the page that the browser keeps, and what of it is believed."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio as gr

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import ADVANCED, LABELS
from dora_diffusion.studio.app.views.ui import LIMIT, can_hold, kept_fields
from tests.studio.app.views.helpers import built_page


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
    assert {name.partition("/")[0] for name in kept} == {
        "subject", "train", "generate", "library", "compare"
    }  # fmt: skip


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


@pytest.mark.parametrize("kept", [None, [], "x", {}, {"train/rank": ["evil"], "unknown": "x"}])
def test_what_is_no_draft_changes_nothing(blocks: gr.Blocks, kept: Any) -> None:
    assert all(update == gr.skip() for update in restoring(blocks).fn(kept))


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


def test_a_choice_that_another_version_had_is_empty_with_its_reason(
    blocks: gr.Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presets, schedulers, programs and all other lists that do not change, one by one."""
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    dependency = restoring(blocks)
    lists = {
        name: field for name, field in kept_fields(blocks).items()
        if isinstance(field, (gr.Radio, gr.Dropdown)) and field.choices
        and not (isinstance(field, gr.Dropdown) and (field.multiselect or field.allow_custom_value))
    }  # fmt: skip
    assert {"train/Preset", "train/optimizer", "generate/Scheduler", "library/Program"} < {*lists}
    for name, field in lists.items():
        updates = zip(dependency.outputs, dependency.fn({name: "unheard-of"}), strict=True)
        changed = {one._id: update for one, update in updates if update != gr.skip()}
        assert changed == {field._id: gr.update(value=None)}, name
        assert told.pop() == f"{field.label}: unheard-of is no longer a choice; choose again"
    assert not told


def test_a_slider_is_widened_to_what_an_image_or_an_earlier_visit_says(blocks: gr.Blocks) -> None:
    kept = {"generate/Strength": 2.5, "generate/Direction": -1, "generate/Magnitude": 0.5}
    dependency = restoring(blocks)
    updates = zip(dependency.outputs, dependency.fn(kept), strict=True)
    limits = {
        field.label: (update["minimum"], update["value"], update["maximum"])
        for field, update in updates
        if "value" in update
    }
    assert limits == {"Strength": (-3, 2.5, 3), "Direction": (-1, -1, 2), "Magnitude": (0, 0.5, 2)}
