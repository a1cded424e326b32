"""The command that makes the app's images: which there are, and how it waits and ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tools.images.app import HEIGHTS, PHONE, PHONE_HEIGHT, SCHEMES, WIDTH, Tab, in_a_row

IMAGES = Path(__file__).parents[3] / "docs" / "images"
NAMES = [*HEIGHTS, "checkpoints", "phone"]


def test_every_image_is_there_in_both_schemes_and_no_other() -> None:
    made = {f"app-{name}{mark}.jpg" for name in NAMES for mark in SCHEMES.values()}
    assert {path.name for path in IMAGES.glob("app-*")} == made
    for name, height in HEIGHTS.items():
        for mark in SCHEMES.values():
            with Image.open(IMAGES / f"app-{name}{mark}.jpg") as image:
                assert image.size == (WIDTH, height)


def test_screens_are_joined_in_their_order() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    joined = in_a_row([Image.new("RGB", (PHONE, PHONE_HEIGHT), color) for color in colors])
    assert joined.size == (3 * PHONE + 40, PHONE_HEIGHT)
    middles = [joined.getpixel((place * (PHONE + 20) + PHONE // 2, 9)) for place in range(3)]
    assert middles == colors
    assert joined.getpixel((PHONE + 10, 9)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("errors", "until", "reason"),
    [(["Choose a run"], float("inf"), "Choose a run"), ([], float("-inf"), "the time is over")],
)
def test_waiting_ends_where_the_page_shows_an_error_or_the_time_is_over(
    errors: list[str], until: float, reason: str
) -> None:
    api = pytest.importorskip("playwright.sync_api")

    def never(*args: Any, **options: Any) -> None:
        raise api.TimeoutError("not yet")

    tab: Any = object.__new__(Tab)
    tab.until = until
    toasts = SimpleNamespace(all_inner_texts=lambda: errors)
    tab.page = SimpleNamespace(wait_for_function=never, locator=lambda selector: toasts)
    with pytest.raises(SystemExit, match=f"{reason}.*waited for the images"):
        tab.wait("the images")
