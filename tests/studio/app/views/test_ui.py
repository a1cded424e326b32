"""Fields over things that are deleted."""

from __future__ import annotations

import pytest

from dora_diffusion.studio.app.views.ui import choosing, id_dropdown

pytest.importorskip("gradio", reason="gradio is not installed")


def test_an_id_that_is_no_choice_any_more_reaches_its_handler() -> None:
    """Gradio rebuilds a field with each update, and would refuse what was just deleted."""
    field = id_dropdown(label="Run")
    again = type(field)(**{**field.constructor_args, "choices": [("b", "b")]})
    assert again.preprocess("a") == "a"
    assert again.preprocess(["a"]) is None
    assert again.get_block_name() == "dropdown"


def test_a_choice_that_the_page_shows_is_left_to_whoever_chooses() -> None:
    choices = [("a", "1"), ("b", "2")]
    for shown, sent in (("1", {}), ("2", {"value": "1"}), (None, {"value": "1"})):
        mark, make = choosing(choices, "1", shown, visible=True)
        assert mark == {"choices": choices, "visible": True} | sent
        assert ("value" in make()) is bool(sent)
