"""Counts, quotes and near words of messages."""

from __future__ import annotations

import doctest

import pytest

from dora_diffusion.config import wording


def test_the_documented_examples_are_true() -> None:
    assert doctest.testmod(wording).failed == 0


def test_a_long_text_is_quoted_on_one_short_line() -> None:
    text = "a photo of a sks dog\non a beach, " + "very detailed, " * 50 + "at night"
    line = wording.quoted(text)
    assert "\n" not in line
    assert len(line) < 100
    assert line.startswith("'a photo of a sks dog on a beach")
    assert line.endswith("at night'")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("learning_rte", "learning_rate"),
        ("max-train-steps", "max_train_steps"),
        ("max_train", "max_train_steps"),
        ("RANK", "rank"),
        ("zzz", None),
    ],
)
def test_the_word_that_was_meant_is_found(word: str, expected: str | None) -> None:
    known = ("rank", "learning_rate", "max_train_steps", "train_batch_size")
    assert wording.closest(word, known) == expected
