"""Counts, quotes and near words of messages."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

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


PACKAGE = Path(wording.__file__).parents[1]
ROOT = PACKAGE.parent
# The app's ids and folders on disk keep their names; captions are what they are.
NAMES = {"app", "jobs", "captions.py"}
# What the field does not say -> its word.
DIALECT = {
    r"(go|goes|going|went) on\b": "resume, continue",
    r"anew\b": "again, from scratch",
    r"spellings?\b": "key format",
    r"taken over\b": "subject leakage",
    r"how sure\b": "confidence interval",
}


def pictures(path: Path) -> Iterator[str]:
    """Strings of a module, but for docstrings, that say picture."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings and re.search(r"(?i)\bpictures?\b", node.value):
            yield f"{path.name}:{node.lineno}: {node.value}"


def test_messages_say_image_not_picture() -> None:
    """The field's word, in what is printed and written."""
    paths = [p for p in PACKAGE.rglob("*.py") if not NAMES & {*p.relative_to(PACKAGE).parts}]
    assert not [line for path in paths for line in pictures(path)]


def test_documents_and_code_speak_the_words_of_the_field() -> None:
    """A reader searches for resume, key format, confidence interval, subject leakage."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    paths += [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("README.md")]
    assert len(paths) > 200
    for path in paths:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for words, instead in DIALECT.items():
            match = re.search(rf"(?i)\b{words}", text)
            assert not match, f"{path}: {match[0]!r}: say {instead}"


# What begins a clause, and neither a verb nor a noun phrase.
CLAUSE = r"How|Let|See that|That|What|Whether|When|Where|Which|Who|Why"


def test_docstrings_begin_with_a_verb_or_a_noun_phrase() -> None:
    """Those of modules, classes, functions and values, of the package and all beside it."""
    folders = ("benchmarks", "docs", "dora_diffusion", "notebooks", "samples", "tests", "tools")
    paths = [*ROOT.glob("*.py"), *(p for name in folders for p in ROOT.glob(f"{name}/**/*.py"))]
    assert len(paths) > 600
    for path in paths:
        found = re.findall(rf'(?m)^ *"""((?:{CLAUSE})\b.*)', path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"
