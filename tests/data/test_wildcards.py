"""Wildcards against every combination of their alternatives, written out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from dora_diffusion.data.captions import (
    Wildcards,
    at_random,
    contains_token,
    preferring,
    render,
    variants,
)
from tests.refusal import refused

# Text -> all that it may become, in the order of its alternatives.
CASES = {
    "a dog": ["a dog"],
    "a {red|green} dog": ["a red dog", "a green dog"],
    "{a|the {old|{|very }new}} dog": ["a dog", "the old dog", "the new dog", "the very new dog"],
    r"saber \(fate\), \{a|b\}, \__x__, a_b": [r"saber \(fate\), {a|b}, __x__, a_b"],
    r"{a\|b|\}}": ["a|b", "}"],
    "on __place__": ["on grass", "on the red sand", "on the blue sand"],
    "{__sea/fish__|a dog}": ["a cod", "a dog"],
    "{one}|two": ["one|two"],
    "{a|b} {c|d}": ["a c", "b c", "a d", "b d"],
}


@pytest.fixture
def wildcards(tmp_path: Path) -> Wildcards:
    (tmp_path / "sea").mkdir()
    (tmp_path / "place.txt").write_text("# places\ngrass\n\nthe __colour__ sand\n", "utf-8")
    (tmp_path / "colour.txt").write_text("\ufeffred\r\nblue\r\n", "utf-8")
    (tmp_path / "sea" / "fish.txt").write_text("a cod", "utf-8")
    (tmp_path / "loop.txt").write_text("a\n{b|__loop__}\n", "utf-8")
    (tmp_path / "empty.txt").write_text("# nothing\n", "utf-8")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\x00s")
    return Wildcards(tmp_path)


@pytest.mark.parametrize("text", CASES)
def test_everything_that_may_be_drawn_is(text: str, wildcards: Wildcards) -> None:
    template, expected = wildcards.parse(text), CASES[text]
    pick = at_random(torch.Generator().manual_seed(0))
    drawn = Counter(render(template, pick) for _ in range(200))
    assert set(drawn) == set(expected)
    shown = variants(template)
    assert shown[0] == expected[0]
    assert set(shown) <= set(expected)
    for word in {word for one in expected for word in one.split()}:
        assert any(word in one.split() for one in shown), "each alternative is in one of them"


def test_alternatives_are_equally_likely(wildcards: Wildcards) -> None:
    template = wildcards.parse("{a|b|c|__colour__}")
    pick = at_random(torch.Generator().manual_seed(0))
    drawn = Counter(render(template, pick) for _ in range(4000))
    # Standard deviations of 27 and 21.
    assert all(abs(drawn[letter] - 1000) < 100 for letter in "abc")
    assert all(abs(drawn[colour] - 500) < 80 for colour in ("red", "blue"))


@pytest.mark.parametrize(
    ("text", "avoidable"),
    [
        ("{sks|a} dog and {the|sks} cat", True),
        ("{sks|a sks {big|old}} dog", False),
        ("{a|{the|{one|sks}}} dog", True),
        ("{sksy|sks} dog", True),
        ("sks {a|b}", False),
    ],
)
def test_whether_a_word_can_be_avoided(text: str, avoidable: bool, wildcards: Wildcards) -> None:
    """By the alternative that avoids it, against a thousand draws."""
    template = wildcards.parse(text)
    avoids = render(template, preferring(lambda own: not contains_token(own, "sks")))
    holds = render(template, preferring(lambda own: contains_token(own, "sks")))
    pick = at_random(torch.Generator().manual_seed(0))
    drawn = {contains_token(render(template, pick), "sks") for _ in range(1000)}
    assert (not contains_token(avoids, "sks"), contains_token(holds, "sks")) == (avoidable, True)
    assert drawn == ({True, False} if avoidable else {True})


@pytest.mark.parametrize(
    ("setting", "text", "words"),
    [
        ("wildcards", "a {b|c", "{ without }; the character is \\{"),
        ("wildcards", "a} b", "} without {"),
        ("wildcard_dir", "a __gone__", "no file gone.txt in "),
        ("wildcards", "a __loop__", "refers to itself: loop > loop"),
        ("wildcard_dir", "a __empty__", "no lines in empty.txt"),
        ("wildcard_dir", "a __broken__", "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    setting: str, text: str, words: str, wildcards: Wildcards
) -> None:
    with refused(setting, words):
        wildcards.parse(text)


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with refused("wildcard_dir", "is not a folder"):
        Wildcards(tmp_path / "gone")
    with refused("wildcard_dir", "__colour__ needs a file"):
        Wildcards().parse("__colour__")


def test_large_files_that_name_each_other_stay_quick(tmp_path: Path) -> None:
    for name, inner in (("a", "__b__"), ("b", "__c__"), ("c", "x")):
        lines = "".join(f"{name}{k} {inner}\n" for k in range(300))
        (tmp_path / f"{name}.txt").write_text(lines, encoding="utf-8")
    template = Wildcards(tmp_path).parse("__a__ {sks|}")
    assert len(variants(template)) == 1000
    assert render(template, preferring(lambda own: "sks" in own)) == "a0 b0 c0 x sks"
