"""Subjects of a study."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.study.subjects import PhotoSource


@pytest.mark.parametrize(("word", "noun"), [("mug", "a sks mug"), ("", "a sks")])
def test_photos_are_labelled_with_what_the_first_image_is_asked_to_show(
    tmp_path: Path, word: str, noun: str
) -> None:
    for place, name in enumerate(("photos", "held_out")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32 + place)).save(tmp_path / name / "1.png")
    given = {name: str(tmp_path / name) for name in ("photos", "held_out")}
    prompt = {"instance_prompt": f"a photo of a sks {word}".strip(), "class_word": word}
    source = PhotoSource.read({**given, **prompt, "name": "My mug"}, [])
    assert source.label.startswith("My mug ")
    assert noun in source.label
