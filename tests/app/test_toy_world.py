"""What the embedded models know."""

from __future__ import annotations

import pytest

from dora_diffusion.app.toy_world import is_toy_word, outside_toy_world


@pytest.mark.parametrize(
    ("word", "is_known"),
    [("mug", True), ("red Mugs", True), ("mug shot", False), ("dog", False), ("", False)],
)
def test_a_class_is_known_by_its_last_word(word: str, is_known: bool) -> None:
    assert is_toy_word(word) is is_known


def test_only_an_embedded_model_is_a_toy() -> None:
    warning = outside_toy_world("embedded:tiny-sd", " dog ")
    assert warning.startswith("embedded:tiny-sd is a toy model of a drawn world: it knows ")
    assert "and no dog." in warning
    assert outside_toy_world("embedded:tiny-sd", "mug") == ""
    assert outside_toy_world("embedded:tiny-sd", " ") == ""
    assert outside_toy_world("org/model", "dog") == ""
