"""The subject of a run, and prompts that name it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.training.subject import is_toy_word, outside_toy_world
from tests.training.helpers import warnings_of


def test_a_prompt_that_watches_drift_is_warned_of_and_sampled(config):
    watch = replace(
        config,
        max_train_steps=1,
        validation_prompt=["a photo of a mug"],
        num_validation_images=1,
        validation_inference_steps=1,
    )
    said = warnings_of(watch)
    assert any("'a photo of a mug' does not contain the token 'sks': its" in text for text in said)
    assert (Path(config.output_dir) / "samples" / "adapted.png").is_file()


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
