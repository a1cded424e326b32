"""The tool that makes the app's images: which there are, and how screens of a phone are joined."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from tools.screenshots import HEIGHTS, PHONE, PHONE_HEIGHT, WIDTH, beside

DOCS = Path(__file__).parents[2] / "docs"


def test_every_image_of_the_document_is_one_that_it_makes() -> None:
    shown = re.findall(
        r"\(\.\./images/app-(\w+)\.jpg\)", (DOCS / "howto" / "app.md").read_text(encoding="utf-8")
    )
    assert sorted(shown) == sorted([*HEIGHTS, "checkpoints", "phone"])
    for name, height in HEIGHTS.items():
        with Image.open(DOCS / "images" / f"app-{name}.jpg") as image:
            assert image.size == (WIDTH, height)


def test_screens_are_joined_in_their_order() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    joined = beside([Image.new("RGB", (PHONE, PHONE_HEIGHT), color) for color in colors])
    assert joined.size == (3 * PHONE + 40, PHONE_HEIGHT)
    middles = [joined.getpixel((place * (PHONE + 20) + PHONE // 2, 9)) for place in range(3)]
    assert middles == colors
    assert joined.getpixel((PHONE + 10, 9)) == (255, 255, 255)
