"""Sample sheets: their labels, their images, and the text in their files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageChops

from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.images import parse_parameters, read_parameters
from dora_diffusion.models.load import load_components
from dora_diffusion.training.loop import train
from dora_diffusion.training.sheets import labelled_sheet, stacked

PROMPTS = ["a photo of a sks mug on the snow", "a sks mug, at night"]


def find(sheet: Image.Image, image: Image.Image) -> list[tuple[int, int]]:
    """Where an image lies in a sheet, pixel by pixel: (left, top) of each place."""
    whole, part = np.asarray(sheet.convert("RGB")), np.asarray(image.convert("RGB"))
    height, width = part.shape[:2]
    return [
        (x, y)
        for y in range(whole.shape[0] - height + 1)
        for x in range(whole.shape[1] - width + 1)
        if np.array_equal(whole[y, x], part[0, 0])
        and np.array_equal(whole[y : y + height, x : x + width], part)
    ]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(drawn)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (512, 512)])
def test_images_lie_in_rows_and_columns_and_none_is_written_over(size):
    images = [noise(size, seed) for seed in range(4)]
    sheet = labelled_sheet(images, "After 300 steps", PROMPTS, ["seed 5", "seed 6"])
    places = [find(sheet, image) for image in images]
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
        sheet = labelled_sheet(
            images, labels["title"], [labels["row"]], [labels["column"], "seed 1"]
        )
        return sheet, [find(sheet, image) for image in images]

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


def test_stacked_sheets_keep_their_pixels():
    first, second = noise((40, 20), 1), noise((30, 10), 2)
    whole = stacked([first, second])
    assert find(whole, first) == [(0, 0)]
    assert len(find(whole, second)) == 1


def test_a_runs_sheets_say_what_they_are(tiny_run, sd1_folder, tmp_path):
    config = tiny_run(
        max_train_steps=2, validation_steps=1, num_validation_images=2, seed=5,
        validation_prompt=PROMPTS, validation_guidance_scale=4.0,
    )  # fmt: skip
    events = []
    result = train(config, events.append)
    samples = tmp_path / "out" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [
        "adapted.png", "base.png", "base_above_adapted.png", "step-000001.png",
    ]  # fmt: skip
    facts = {name: parse_parameters(read_parameters(samples / f"{name}.png"))
             for name in ("base", "adapted", "step-000001", "base_above_adapted")}  # fmt: skip
    for name, step in (("base", "2"), ("adapted", "2"), ("step-000001", "1")):
        assert facts[name]["Prompt"] == PROMPTS[0]
        assert json.loads(facts[name]["Prompts"]) == PROMPTS
        assert (facts[name]["Seed"], facts[name]["Seeds"]) == ("5", "5, 6")
        assert facts[name]["Training step"] == step
        assert (facts[name]["Steps"], facts[name]["CFG scale"]) == ("2", "4")
        assert facts[name]["Size"] == "32x32"
        assert str(tmp_path) not in str(facts[name])
    assert "Adapter" not in facts["base"]
    assert facts["base_above_adapted"] == facts["adapted"]
    assert facts["adapted"]["Adapter"] == facts["step-000001"]["Adapter"] == "out"
    # What the text says makes the image that is there.
    settings = SamplingSettings(steps=2, guidance_scale=4.0, width=32, height=32)
    base = generate_images(load_components(sd1_folder), PROMPTS[1], [6], settings)[0]
    with Image.open(samples / "base.png") as sheet:
        assert len(find(sheet, base)) == 1
    with Image.open(samples / "step-000001.png") as sheet:
        assert find(sheet, base) == []
    told = [(e["done"], e["total"]) for e in events if e["event"] == "sampling"]
    # The model's own scheduler, PNDM, takes three steps where it is asked for two.
    assert told == [(step, 6) for step in range(1, 7)] * 3
    assert result.samples["base"] == samples / "base.png"


def test_the_thumbnail_shows_samples_and_no_letters(tiny_run, tmp_path):
    import base64
    import io

    from dora_diffusion.formats.adapter.file import read_adapter

    result = train(tiny_run(max_train_steps=1, num_validation_images=2))
    uri = read_adapter(result.adapter).metadata.thumbnail
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as thumbnail:
        assert thumbnail.size == (66, 32), "two images and the gap between them"
