"""Counts, quotes and near words of messages."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_diffusion import wording


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


PACKAGE = Path(wording.__file__).parent
# The app has its own words, and its jobs keys and folders on disk; captions are what they are.
NOT_READ = ("app", "jobs", "captions.py")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a module that are no docstrings, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def test_messages_say_image_not_picture() -> None:
    """The field's word, in what is printed and written."""
    said = [
        f"{path.name}:{line}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not set(NOT_READ) & set(path.relative_to(PACKAGE).parts)
        for line, text in texts(path)
        if re.search(r"\bpictures?\b", text, re.IGNORECASE)
    ]
    assert said == []
