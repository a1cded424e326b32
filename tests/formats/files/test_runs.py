"""Names that are made from users' words are names on every file system."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_diffusion.formats.files import runs
from dora_diffusion.formats.files.runs import file_stem
from tests.portable.windows import is_name


def test_the_documented_examples_are_true() -> None:
    assert doctest.testmod(runs).failed == 0


@given(st.text())
@example("a" * 59 + " b")
@example("COM1")
@example("nul.")
@example("..")
@example("Ünïcode / with: spaces ")
def test_whatever_the_words_are_it_is_a_name_on_windows(words: str) -> None:
    stem = file_stem(words, "subject")
    assert is_name(stem)
    assert is_name(f"{stem}.safetensors")
    assert stem == stem.lower()
    assert 1 <= len(stem) <= 60


@pytest.mark.parametrize(
    ("words", "stem"),
    [("sks mug", "sks-mug"), ("sks  Red-mug", "sks-red-mug"), ("Straße", "strasse"), ("", "x")],
)
def test_plain_words_stay_readable(words: str, stem: str) -> None:
    assert file_stem(words, "x") == stem
