"""Labelled sheets, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageChops

from dora_diffusion.data.sheets import labelled_sheet, sheet
from tests.training.helpers import find, noise

PROMPTS = ["a photo of a sks mug on the snow", "a sks mug, at night"]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (312, 312)])
def test_images_lie_in_rows_and_columns_and_none_is_written_over(size):
    images = [noise(size, seed) for seed in range(4)]
    drawn = labelled_sheet(images, "After 300 steps", PROMPTS, ["seed 5", "seed 6"])
    places = [find(drawn, image) for image in images]
    assert [len(place) for place in places] == [1, 1, 1, 1]
    (a, b, c, d) = (place[0] for place in places)
    assert a[1] == b[1] < c[1] == d[1]
    assert a[0] == c[0] < b[0] == d[0]
    assert b[0] - a[0] >= size[0]
    assert c[1] - a[1] > size[1], "the second row's prompt is between"


@pytest.mark.parametrize("changed", ["title", "row", "column"])
def test_every_label_is_drawn_and_changes_no_image(changed):
    images = [noise((64, 64), seed) for seed in range(2)]
    labels = {"title": "Step 1", "row": "a mug", "column": "seed 0"}

    def draw(labels):
        drawn = labelled_sheet(
            images, labels["title"], [labels["row"]], [labels["column"], "seed 1"]
        )
        return drawn, [find(drawn, image) for image in images]

    (before, places), (after, again) = draw(labels), draw(labels | {changed: "Step 9 xyz"})
    assert places == again
    assert ImageChops.difference(before, after).getbbox() is not None


def test_long_prompts_take_more_lines_and_stay_inside():
    images = [noise((64, 64), seed) for seed in range(2)]
    short = labelled_sheet(images, "x", ["a mug"], ["0", "1"])
    long = labelled_sheet(images, "x", ["a mug " * 40 + "w" * 300], ["0", "1"])
    assert long.width == short.width
    assert long.height > short.height + 5 * 12
    margin = np.asarray(long)[:, -2:]
    assert (margin[: long.height - 70] == 255).all(), "no letter is cut at the right"


def test_a_column_head_longer_than_its_column_is_broken_into_lines():
    images = [noise((64, 64), seed) for seed in range(2)]
    whole, shorter, head = (
        labelled_sheet(images, "", [""], [head, "x"])
        for head in ("learning_rate=0.0001", "learning_rate=0.000", "x")
    )
    assert whole.height > head.height
    assert ImageChops.difference(whole, shorter).getbbox() is not None


def test_a_table_of_images_has_every_label_and_image_in_bands():
    rows = {
        name: [noise((40, 40), 9 * at + seed) for seed in range(3)] for at, name in enumerate("ab")
    }
    labels = ["a mug on the snow at night by the lake", "x", "y"]
    whole = sheet(rows, labels, columns=2, side=40)
    places = [[find(whole, image)[0] for image in images] for images in rows.values()]
    (first, second, third), (below, _, last) = places
    assert first[0] == below[0] == third[0] == last[0] < second[0]
    assert first[1] == second[1] < below[1] < third[1] < last[1]
    assert below[1] - first[1] - 40 < first[1], "only a row's name is between, not its labels"
