"""What the browser keeps of the Train form, and what of it is believed."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from dora_diffusion.app.settings import (
    ADVANCED,
    EMBEDDED,
    FORM,
    SAVE_SCRIPT,
    advanced_values,
    form_values,
    preset_values,
    setting_text,
    subject_of_draft,
)

FIELDS = {name: setting_text(value) for name, value in preset_values("fast", EMBEDDED).items()}
VALUES = ("quality", "org/model", "zwx", "cup", "a {subject}\nmore")


def make_draft(subject: str, form: Any, advanced: dict[str, Any]) -> dict[str, Any]:
    return {"subject": subject, "form": dict(zip(FORM, form, strict=True)), "advanced": advanced}


def test_a_form_comes_back_as_it_was() -> None:
    draft = make_draft("20261126-030405-abcdef", VALUES, dict(FIELDS))
    assert subject_of_draft(draft) == "20261126-030405-abcdef"
    assert form_values(draft) == dict(zip(FORM, VALUES, strict=True))
    assert advanced_values(draft) == FIELDS


@pytest.mark.parametrize("draft", [None, {}, [], "x", {"form": 3, "advanced": ["a"]}])
def test_what_is_no_form_is_none(draft: Any) -> None:
    assert (subject_of_draft(draft), form_values(draft), advanced_values(draft)) == ("", {}, {})


def test_only_values_that_a_field_can_have_are_believed() -> None:
    draft = make_draft("", VALUES, dict(FIELDS))
    draft["form"] |= {"preset": "best", "token": 7, "unknown": "x"}
    draft["advanced"] |= {
        "use_dora": "yes", "optimizer": "sgd", "rank": 8, "class_prompt": "x" * 5000, "evil": "y",
    }  # fmt: skip
    assert set(form_values(draft)) == {"model", "class_word", "prompts"}
    left_out = {"use_dora", "optimizer", "rank", "class_prompt"}
    assert set(advanced_values(draft)) == set(ADVANCED) - left_out


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_what_the_browser_keeps_is_what_is_read() -> None:
    def kept(window: str) -> object:
        values = json.dumps(["before", "id", *VALUES, *FIELDS.values()])
        script = f"window = {window}; console.log(JSON.stringify(({SAVE_SCRIPT})(...{values})))"
        done = subprocess.run(["node", "-e", script], capture_output=True, check=True)
        return json.loads(done.stdout)

    assert kept("{ddRestored: true}") == make_draft("id", VALUES, dict(FIELDS))
    # Until the page has got back what was kept, that stays.
    assert kept("{}") == "before"
