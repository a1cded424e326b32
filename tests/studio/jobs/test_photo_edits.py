"""Cropping and masking a photo, and undoing it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.data.photos import mask_path
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    new_subject,
    photo_path,
)
from dora_diffusion.studio.jobs.uploads import edit_photo, read_mask, restore_original
from tests.studio.jobs.helpers import photo


def png_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_crop_and_mask_can_be_undone(workspace: Workspace, subject: str) -> None:
    path = photo_path(workspace, subject, "001.jpg")  # 120 x 80
    before = path.read_bytes()
    # Painted on a preview of half the size: x 30 to 45, y 10 to 30.
    preview = Image.new("RGBA", (60, 40))
    preview.paste((227, 93, 43, 255), (30, 10, 45, 30))
    edit_photo(path, (0.25, 0.0, 0.75, 1.0), read_mask(png_address(preview)))
    with Image.open(path) as image, Image.open(mask_path(path)) as mask:
        assert image.size == mask.size == (60, 80)
        assert mask.getextrema() == (0, 255)
        # In the crop, which begins at x = 30 of the photo.
        assert mask.getpixel((45, 40)) == 255
        assert mask.getpixel((20, 40)) == mask.getpixel((45, 70)) == 0
    edit_photo(path, (0.0, 0.0, 1.0, 0.5), None)
    with Image.open(path) as image:
        assert image.size == (60, 40)
    assert not mask_path(path).exists()
    restore_original(path)
    assert path.read_bytes() == before
    assert not mask_path(path).exists()


def test_a_crop_keeps_the_alpha_mask(workspace: Workspace, tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 80), (255, 255, 255, 0))
    image.paste((0, 200, 0, 255), (30, 20, 70, 60))
    image.save(tmp_path / "cutout.png")
    subject = new_subject(workspace, "Cutout")
    (stored,) = add_photos(workspace, subject, [tmp_path / "cutout.png"]).accepted
    edit_photo(stored, (0.2, 0.0, 0.8, 1.0), None)
    with Image.open(stored) as cropped:
        assert cropped.mode == "RGBA"
        assert cropped.tobytes() == image.crop((20, 0, 80, 80)).tobytes()
    restore_original(stored)
    with Image.open(stored) as restored:
        assert restored.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "crop",
    [(0, 0, 1), (0, 0, 2, 1), (-0.1, 0, 1, 1), (0.5, 0, 0.5, 1), (0.9, 0, 0.1, 1),
     ("0", 0, 1, 1), (float("nan"), 0, 1, 1), (0, 0, 0.1, 0.1), "abcd", (None,) * 4,
     (0, 0, 1, 0.13)],
)  # fmt: skip
def test_a_crop_that_is_none_changes_nothing(
    workspace: Workspace, subject: str, crop: object
) -> None:
    path = photo_path(workspace, subject, "001.jpg")
    photo(path, (400, 300))
    before = path.read_bytes()
    with pytest.raises(UserError, match="crop"):
        edit_photo(path, crop, None)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert not (path.parent.parent / "originals").exists()


@pytest.mark.parametrize(
    "mask", ["x", "data:image/svg+xml,<svg/>", "data:image/png;base64,AAAA", 5, ["a"], "a" * 2**23]
)
def test_a_mask_that_is_no_image_is_refused(mask: object) -> None:
    with pytest.raises(UserError, match="paint it again"):
        read_mask(mask)


def test_a_mask_is_small() -> None:
    assert read_mask("") is None
    assert read_mask(png_address(Image.new("RGBA", (8, 8)))) is not None
    with pytest.raises(UserError, match="paint it again"):
        read_mask(png_address(Image.new("L", (5000, 5000))))
