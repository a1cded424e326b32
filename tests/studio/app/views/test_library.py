"""The Library tab's thumbnails."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app.views.library import _thumbnail

pytest.importorskip("gradio", reason="gradio is not installed")


def test_of_a_sheet_one_image_is_shown_without_its_labels(tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 48), (0, 20 * place, 90)) for place in range(6)]
    rows = ["a photo of a sks mug in a place with a long name", "another"]
    sheet = labelled_sheet(images, "After 3 steps", rows, ["seed 0", "seed 1", "seed 2"])
    path = save_image(sheet, tmp_path / "adapted.png", "a mug\nSteps: 2, Seed: 0, Size: 64x48")
    # The first of the last row.
    assert _thumbnail(path).getcolors() == [(256 * 256, (0, 60, 90))]


def test_of_a_photo_a_square_is_shown(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (9, 8, 7)).save(tmp_path / "001.png")
    assert _thumbnail(tmp_path / "001.png").getcolors() == [(256 * 256, (9, 8, 7))]
