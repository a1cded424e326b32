"""Cropping and masking a photo in the page, and undoing it."""

from __future__ import annotations

import base64
import binascii
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion import system
from dora_diffusion.data.images import MAX_ASPECT, open_photo, open_photo_with_alpha
from dora_diffusion.data.masks import mask_path
from dora_diffusion.jobs.subjects import original_of
from dora_diffusion.jobs.uploads import JPEG_QUALITY
from dora_diffusion.jobs.workspace import RequestError

EDITOR_SIDE = 768
SMALLEST_CROP = 32
_PNG = "data:image/png;base64,"


def edit_photo(photo: Path, crop: Sequence[float] | None, mask: Image.Image | None) -> None:
    """Take over what was cropped and painted; the photo before its first crop is kept.

    Args:
        photo: The photo.
        crop: Left, top, right and bottom as fractions of it; None leaves it whole.
        mask: Of the whole photo ("L", any size): bright is the subject. None leaves it as it is.

    Raises:
        RequestError: If the crop is none, or too small or too thin to train on.
    """
    whole, alpha = open_photo_with_alpha(photo)
    box = _pixels(crop, whole.size) if crop is not None else (0, 0, *whole.size)
    if box != (0, 0, *whole.size):
        if not original_of(photo).exists():
            original_of(photo).parent.mkdir(exist_ok=True)
            shutil.copyfile(photo, original_of(photo))
        if alpha is not None and photo.suffix != ".jpg":  # JPEG has none
            whole.putalpha(alpha)
        kind: dict[str, Any] = {"quality": JPEG_QUALITY} if photo.suffix == ".jpg" else {}
        whole.crop(box).save(photo, **kind)
        mask_path(photo).unlink(missing_ok=True)
    if mask is not None and mask.getbbox():
        painted = mask.resize(whole.size).crop(box)
        painted.point(lambda value: 255 if value > 32 else 0).save(mask_path(photo))


def _pixels(crop: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fractions of a photo as pixels."""
    numbers = [value for value in crop if isinstance(value, (int, float)) and 0 <= value <= 1]
    if len(numbers) != 4 or len(crop) != 4:
        raise RequestError("this is no crop; draw a rectangle inside of the photo")
    left, top, right, bottom = (
        round(value * side) for value, side in zip(numbers, (*size, *size), strict=True)
    )
    if right - left < SMALLEST_CROP or bottom - top < SMALLEST_CROP:
        raise RequestError(
            f"the crop is smaller than {SMALLEST_CROP} pixels; draw a larger rectangle"
        )
    if max(right - left, bottom - top) > MAX_ASPECT * min(right - left, bottom - top):
        raise RequestError("the crop is a strip; draw a rectangle that is nearer to a square")
    return left, top, right, bottom


def read_mask(address: object) -> Image.Image | None:
    """The painted part ("L") of a PNG that a page sent as a data URI; None if it is empty.

    Raises:
        RequestError: If it is no PNG, or a large one.
    """
    if not address:
        return None
    try:
        if not isinstance(address, str) or len(address) > 4 * 2**20:
            raise ValueError
        content = base64.b64decode(address.removeprefix(_PNG), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if max(image.size) > 2 * EDITOR_SIDE:
                raise ValueError
            return image.convert("RGBA").getchannel("A")
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise RequestError("the mask could not be read; paint it again") from error


def editor_image(photo: Path) -> str:
    """A photo as a data URI, small enough to be drawn on."""
    image = open_photo(photo)
    image.thumbnail((EDITOR_SIDE, EDITOR_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def restore_original(photo: Path) -> None:
    """Undo crop and mask."""
    mask_path(photo).unlink(missing_ok=True)
    if original_of(photo).exists():
        system.replace(original_of(photo), photo)
