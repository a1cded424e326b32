"""Fields over things that are deleted."""

from __future__ import annotations

import pytest

from dora_diffusion.app.views.fields import id_dropdown

pytest.importorskip("gradio", reason="gradio is not installed")


def test_an_id_that_is_no_choice_any_more_reaches_its_handler() -> None:
    """Gradio rebuilds a field with each update, and would refuse what was just deleted."""
    field = id_dropdown(label="Run")
    again = type(field)(**{**field.constructor_args, "choices": [("b", "b")]})
    assert again.preprocess("a") == "a"
    assert again.preprocess(["a"]) is None
    assert again.get_block_name() == "dropdown"
