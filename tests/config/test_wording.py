"""Counts, quotes and near words of messages."""

from __future__ import annotations

import doctest
import re
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
# What the field does not say -> its word.
DIALECT = {
    r"(go|goes|going|went) on\b": "resume, continue",
    r"anew\b": "again, from scratch",
    r"spellings?\b": "key format",
    r"taken over\b": "subject leakage",
    r"how sure\b": "confidence interval",
    r"made again\b": "repeated, recomputed",
    r"knows? of\b": "knows, reads",
}


# Words of the embedded models' captions, and tests of the word.
SPEAKING = {
    "tests/cli/commands/test_parser.py", "tests/config/test_wording.py",
    "tools/pretrain/captions.py", "tools/pretrain/tokenizer.py",
}  # fmt: skip


def sources() -> dict[Path, str]:
    """The text of each module of the package, and of all beside it."""
    folders = ("benchmarks", "docs", "dora_diffusion", "notebooks", "samples", "tests", "tools")
    paths = [*ROOT.glob("*.py"), *(p for name in folders for p in ROOT.glob(f"{name}/**/*.py"))]
    assert len(paths) > 600
    return {path: path.read_text(encoding="utf-8") for path in paths}


def test_messages_and_code_say_image_not_picture() -> None:
    """The field's word."""
    for path, text in sources().items():
        is_exempt = path.relative_to(ROOT).as_posix() in SPEAKING
        assert is_exempt or "picture" not in text.lower(), f"{path}: say image"


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
    """Those of modules, classes, functions and values."""
    for path, text in sources().items():
        found = re.findall(rf'(?m)^ *"""((?:{CLAUSE})\b.*)', text)
        assert not found, f"{path}: {found}"
