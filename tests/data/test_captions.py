"""Captions: files, tags, dropout, class words and the trigger token."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.data.captions import (
    CaptionRules,
    class_caption,
    read_caption,
    require_token,
    stated_rules,
)
from dora_diffusion.formats.adapter.metadata import without_path


def test_a_caption_file_wins_over_the_prompt(tmp_path: Path) -> None:
    photo = tmp_path / "photo.v2.jpg"
    assert read_caption(photo, "a photo of sks dog") == "a photo of sks dog"
    (tmp_path / "photo.v2.txt").write_bytes("\ufeffsks dog,\r\n on gräss \n".encode())
    assert read_caption(photo, "default") == "sks dog, on gräss"
    (tmp_path / "photo.v2.txt").write_text(" \n", encoding="utf-8")
    assert read_caption(photo, "default") == "default"
    (tmp_path / "photo.v2.txt").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ValueError, match=r"photo\.v2\.txt: .*; save it as UTF-8"):
        read_caption(photo, "default")


def test_a_link_to_a_caption_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").symlink_to("gone.txt")
    with pytest.raises(ValueError, match=r"photo\.txt: the caption is a link to a missing file"):
        read_caption(tmp_path / "photo.jpg", "default")


@pytest.mark.parametrize(
    ("caption", "token", "expected"),
    [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("a photo of sks", "sks", "a photo of dog"),
        ("sks on grass, sks dog asleep", "sks", "dog on grass, dog asleep"),
        ("A photo of SKS  Dog", "sks", "A photo of Dog"),
        ("a photo of sksy dog", "sks", "a photo of sksy dog"),
        ("sks doghouse", "sks", "dog doghouse"),
        ("a <my dog> on grass", "<my dog>", "a dog on grass"),
        ("an s+s dog", "s+s", "an dog"),
        ("a photo of a dog", "sks", "a photo of a dog"),
    ],
)
def test_class_captions(caption: str, token: str, expected: str) -> None:
    assert class_caption(caption, token, "dog") == expected


TAGS = "sks dog, grass, sun, ball, tree"


def drawn(text: str, epochs: int = 50, **settings: object) -> list[str]:
    return [CaptionRules(**settings).draw(text, 0, epoch, "photo") for epoch in range(epochs)]


def test_shuffling_keeps_the_first_tags_and_loses_none() -> None:
    orders = drawn(TAGS, shuffle_tags=True)
    assert len(set(orders)) > 10
    for order in orders:
        assert order.startswith("sks dog, ")
        assert sorted(order.split(", ")) == sorted(TAGS.split(", "))
    assert set(drawn(TAGS, shuffle_tags=True, keep_tags=9)) == {TAGS}


def test_tags_are_dropped_at_their_rate_each_by_itself_and_move_no_order() -> None:
    text = ", ".join(["sks dog", *(f"tag {k}" for k in range(20))])
    captions = drawn(text, 300, tag_dropout=0.25)
    counts = Counter(tag for caption in captions for tag in caption.split(", "))
    assert counts["sks dog"] == 300
    rates = [1 - counts[f"tag {k}"] / 300 for k in range(20)]
    # Standard deviations of 0.025 of each, and 0.0056 of all together.
    assert all(0.15 < rate < 0.35 for rate in rates)
    assert abs(sum(rates) / 20 - 0.25) < 0.02
    assert len({len(caption.split(", ")) for caption in captions}) > 6, "not all of one"
    shuffled = drawn(text, shuffle_tags=True)
    for both, order in zip(drawn(text, shuffle_tags=True, tag_dropout=0.5), shuffled, strict=True):
        kept = both.split(", ")
        assert kept == [tag for tag in order.split(", ") if tag in kept]
    assert set(drawn(text, tag_dropout=1.0, keep_tags=2)) == {"sks dog, tag 0"}


def test_lines_are_drawn_by_epoch_and_photo_and_all_have_their_turn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks one\n\n  sks   two\r\nsks three\n", encoding="utf-8")
    assert read_caption(tmp_path / "a.jpg", "x") == "sks one sks two sks three"
    text = read_caption(tmp_path / "a.jpg", "x", per_line=True)
    lines = ["sks one", "sks two", "sks three"]
    rules = CaptionRules(per_line=True)
    assert rules.captions(text) == lines
    counts = Counter(rules.draw(text, 0, epoch, "photo") for epoch in range(900))
    assert set(counts) == set(lines)
    assert all(abs(count - 300) < 60 for count in counts.values())  # Four deviations.
    others = [rules.draw(text, 0, epoch, "other") for epoch in range(20)]
    assert others != [rules.draw(text, 0, epoch, "photo") for epoch in range(20)]
    assert others == [rules.draw(text, 0, epoch, "other") for epoch in range(20)]


def test_the_prefix_stands_outside_of_what_is_shuffled_and_dropped() -> None:
    settings = {"shuffle_tags": True, "keep_tags": 0, "tag_dropout": 0.5, "dropout": 0.2}
    captions = drawn("grass, sun", 200, prefix="a sks dog,", **settings)
    found = re.compile(r"a sks dog,( (grass|sun)(, (grass|sun))?)?|")
    assert all(found.fullmatch(caption) for caption in captions)
    assert "a sks dog, sun, grass" in captions
    assert 20 < captions.count("") < 60
    assert CaptionRules(prefix="a sks dog,").captions("x  y") == ["a sks dog, x y"]
    assert set(drawn("a  b", prefix="")) == {"a  b"}, "untouched without it"


def test_captions_without_tags_have_those_that_are_kept() -> None:
    rules = CaptionRules(per_line=True, tag_dropout=0.5)
    text = "the dog, sun\na sks dog"
    assert rules.captions(text) == ["the dog, sun", "a sks dog"]
    assert rules.without_tags(text) == ["the dog", "a sks dog"]
    loose = replace(rules, keep_tags=0)
    assert loose.without_tags("a sks dog") == [""]
    assert replace(loose, prefix="sks,").without_tags("a dog") == ["sks,"]


def test_the_trigger_token_is_required() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_token(["a SKS dog", "sks, asleep"], "sks")
    with pytest.warns(UserWarning, match="missing from 1 of 2 captions: 'a dog'"):
        require_token(["a sks dog", "a dog"], "sks")
    with pytest.raises(ValueError, match="'sks' is not in the caption 'a sksy dog'"):
        require_token(["a sksy dog"], "sks")
    with pytest.raises(ValueError, match="token is empty"):
        require_token(["a dog"], " ")


def test_rules_are_stated_for_whoever_reads_captions_later() -> None:
    """In a form that metadata keep: a slash is that of a path there, which is cut."""
    rules = CaptionRules(per_line=True, prefix='"sks" ä/b/c\\', shuffle_tags=True, dropout=0.5)
    text = stated_rules({"": rules})
    assert without_path(text) == text
    stated = CaptionRules.from_stated(text)
    assert stated == CaptionRules(per_line=True, prefix=rules.prefix)
    assert stated.plain("a dog\na cat") == '"sks" ä/b/c\\ a dog'
    assert stated_rules({"": CaptionRules(shuffle_tags=True)}) == ""
    for damaged in ("", "[1]", "{", "3", '{"prefix": null}'):
        assert CaptionRules.from_stated(damaged) == CaptionRules()
