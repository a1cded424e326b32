"""The subject of a run, and prompts that name it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
