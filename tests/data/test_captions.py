"""Captions: files, tags, dropout, class words and the trigger token."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from dora_diffusion.data.captions import (
    class_caption,
    drop_caption,
    read_caption,
    require_token,
    shuffle_tags,
    tag_frequency,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_caption_file_wins_over_the_prompt(tmp_path: Path) -> None:
    photo = tmp_path / "photo.v2.jpg"
    assert read_caption(photo, "a photo of sks dog") == "a photo of sks dog"
    (tmp_path / "photo.v2.txt").write_bytes("\ufeffsks dog,\r\n on gräss \n".encode())
    assert read_caption(photo, "default") == "sks dog, on gräss"
    (tmp_path / "photo.v2.txt").write_text(" \n", encoding="utf-8")
    assert read_caption(photo, "default") == "default"
    (tmp_path / "photo.v2.txt").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ValueError, match=r"photo\.v2\.txt: .*UTF-8"):
        read_caption(photo, "default")


def test_a_link_to_a_caption_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").symlink_to("gone.txt")
    with pytest.raises(
        ValueError, match=r"photo\.txt: the caption is a link to a file that is not"
    ):
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


def test_class_words_are_not_patterns() -> None:
    assert class_caption("a sks", "sks", r"\1 toy") == r"a \1 toy"


def test_shuffling_keeps_the_first_tags_and_loses_none() -> None:
    caption = "sks dog, grass, sun, ball, tree"
    orders = {shuffle_tags(caption, seeded(seed), keep=1) for seed in range(50)}
    assert len(orders) > 10
    for order in orders:
        assert order.startswith("sks dog, ")
        assert sorted(order.split(", ")) == sorted(caption.split(", "))
    assert shuffle_tags(caption, seeded(7), keep=9) == caption


def test_tags_are_counted_once_per_caption() -> None:
    counts = tag_frequency(["sks dog, grass, grass", "sks dog,, sun ", "sks dog", ""])
    assert list(counts.items()) == [("sks dog", 3), ("grass", 1), ("sun", 1)]


def test_dropout_has_the_asked_rate() -> None:
    generator = seeded()
    dropped = sum(drop_caption("sks dog", 0.25, generator) == "" for _ in range(2000))
    assert 430 < dropped < 570
    assert drop_caption("sks dog", 0.0, generator) == "sks dog"
    assert drop_caption("sks dog", 1.0, generator) == ""


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


def test_long_captions_are_quoted_short_and_one_is_singular():
    long = "a photo of a dog on a beach, " + "very detailed, " * 60
    with pytest.raises(ValueError, match=r"not in the caption 'a photo of a") as error:
        require_token([long], "sks")
    assert len(str(error.value)) < 250
    with pytest.warns(UserWarning, match="missing from 1 of 2 captions: 'a photo") as said:
        require_token([long, "a sks dog"], "sks")
    assert len(str(said[0].message)) < 200
