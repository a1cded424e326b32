"""The page and the sheet of a grid: its data, whatever a prompt holds, and which image is where."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.sampling import page as module
from dora_diffusion.sampling.images import read_parameters, save_image
from dora_diffusion.sampling.page import PAGE, RECORD, SHEET, GridRecord, page

WORDS = ["</script><script>alert(1)</script>", "<!--", '"\\', "\u2028 é \u0000", "{DATA}", "$&"]


def data_of(text):
    (found,) = re.findall(r'<script type="application/json" id="grid">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_no_text_of_a_prompt_ends_the_script_or_changes():
    record = {"title": WORDS[0], "seed": 1, "axes": [{"name": "replace", "values": WORDS}],
              "files": ["images/a.png"], "texts": {"images/a.png": " ".join(WORDS)}}  # fmt: skip
    text = page(record)
    assert data_of(text) == record
    plain = page({})
    for sign in ("<script", "</script", "<!--"):
        assert text.count(sign) == plain.count(sign)
    text.encode("utf-8")


def test_the_page_asks_for_nothing_off_the_folder():
    text = page({})
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', text)) == {"data:,", "sheet.png"}
    # Texts are put in as texts.
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.fixture
def grid(tmp_path):
    """Three axes over images of one grey each, of which two are one file."""
    files = [f"images/{number}.png" for number in (*range(11), 0)]
    for number, file in enumerate(files[:11]):
        image = Image.new("RGB", (24, 40), (number, 0, 0))
        save_image(image, tmp_path / file, f"a mug\nSteps: {number + 1}")
    axes = {"steps": ["1", "2"], "size": ["a", "b", "c"], "scheduler": ["x", "y"]}
    return GridRecord(axes, files, 7, dict.fromkeys(files, "a mug")), tmp_path


def test_page_and_record_say_the_same_and_keep_the_seed(grid):
    record, folder = grid
    assert record.seed_of(folder) is None
    assert record.write(folder) == folder / PAGE
    written = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert data_of((folder / PAGE).read_text(encoding="utf-8")) == {"title": folder.name} | written
    assert written["files"] == record.files
    assert written["axes"][1] == {"name": "size", "values": ["a", "b", "c"]}
    assert record.seed_of(folder) == 7
    for damaged in ("", "[]", "{}", '{"seed": null}'):
        (folder / RECORD).write_text(damaged, encoding="utf-8")
        assert record.seed_of(folder) is None


def test_the_sheet_has_the_first_axis_across_and_the_others_down(grid):
    record, folder = grid
    record.texts[record.files[0]] = "a dog\nSteps: 1"
    path = record.write_sheet(folder)
    assert path == folder / SHEET
    assert read_parameters(path) == "a dog\nSteps: 1"
    # Of steps 1 and 2, each row the next size and scheduler.
    places = [(steps, below) for below in range(6) for steps in range(2)]
    images = [Image.open(folder / record.files[6 * steps + below]) for steps, below in places]
    rows = [f"size: {size}  ·  scheduler: {scheduler}" for size in "abc" for scheduler in "xy"]
    expected = labelled_sheet(images, "Across: steps  ·  seed 7", rows, ["1", "2"])
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_a_large_sheet_is_smaller_by_one_factor(grid, monkeypatch):
    record, folder = grid
    monkeypatch.setattr(module, "_MOST_PIXELS", 12 * 24 * 40 // 4)
    images = module._opened([folder / file for file in record.files])
    assert {image.size for image in images} == {(12, 20)}
