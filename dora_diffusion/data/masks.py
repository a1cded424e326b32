"""Masks: where an image is learned, found beside it or in its alpha channel, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.data.crops import CropRecord, apply_crop_to_mask
from dora_diffusion.data.images import (
    PhotoError,
    decode_photo,
    digest_of,
    open_photo,
    open_photo_with_alpha,
    read_bytes,
)
from dora_diffusion.wording import counted, listing

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from dora_diffusion.data.photos import Photo

MASK_SUFFIX = ".mask.png"

MaskCrops = Callable[["Photo"], Iterable[CropRecord]]
"""Photo -> crops that it will be trained on, or some of them."""


class MaskError(PhotoError):
    """A photo's mask cannot be used."""


def mask_path(photo: Path) -> Path:
    """Where an image's mask lies: ``NAME.mask.png``."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def find_mask(photo: Photo, alpha: PILImage.Image | None, crops: MaskCrops) -> Photo:
    """A photo with its mask: the file beside it, else its alpha channel where that hides anything.

    An alpha channel beside a mask file is no mask: what it hides is white, and learned where the
    mask is bright.

    Raises:
        MaskError: If the file cannot be used, is not of the photo's size, or the mask is black
            wherever it is looked at.
    """
    path, mask = mask_path(photo.path), alpha
    if path.is_file() or path.is_symlink():
        mask, digest = _read_mask(path, photo.size)
        photo = replace(photo, mask_path=path, mask_digest=digest)
    elif photo.has_transparency:
        photo = replace(photo, mask_path=photo.path)
    if mask is None or photo.mask_path is None:
        return photo
    if not any(apply_crop_to_mask(mask, crop).any() for crop in crops(photo)):
        name = photo.path.name
        where = path.name if photo.mask_path == path else f"the alpha channel of {name}"
        raise MaskError(
            f"{where} is black in every crop that is trained on, so nothing of {name} would be "
            "learned; make bright what to learn, or remove it"
        )
    return photo


def _read_mask(path: Path, size: tuple[int, int]) -> tuple[PILImage.Image, str]:
    """A mask file for a photo of ``(height, width)``, as "L", and its digest."""
    try:
        data = read_bytes(path)
        mask = decode_photo(path.name, data)[0].convert("L")
    except PhotoError as error:
        raise MaskError(str(error)) from error
    if (mask.height, mask.width) != size:
        raise MaskError(
            f"{path.name}: the mask is {mask.width} x {mask.height}, its photo "
            f"{size[1]} x {size[0]}; save it at the photo's size"
        )
    return mask, digest_of(data)


def open_mask(photo: Photo) -> PILImage.Image | None:
    """The mask ("L") that a photo was read with; None where it was read without one."""
    if photo.mask_path is None:
        return None
    if photo.mask_path == photo.path:
        return open_photo_with_alpha(photo.path)[1]
    return open_photo(photo.mask_path).convert("L")


def require_masks(photos: Sequence[Photo]) -> None:
    """Refuse photos of which none has a mask.

    Raises:
        PhotoError: If none has.

    Warns:
        UserWarning: Of photos without a mask beside others that have one, and of alpha channels
            that are masks beside mask files.
    """
    bare = [photo.path.name for photo in photos if photo.mask_path is None]
    if photos and len(bare) == len(photos):
        first = photos[0].path
        raise PhotoError(
            f"masks are to be used, but none of the {counted(len(photos), 'image')} has one: the "
            f"mask of {first.name} is {mask_path(first).name} beside it, of the same size and "
            "bright where to learn; or give images with an alpha channel"
        )
    if bare:
        warnings.warn(
            f"{counted(len(bare), 'image')} of {len(photos)} without a mask, whose whole area is "
            f"learned: {', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}",
            stacklevel=4,
        )
    cut_out = [photo.path.name for photo in photos if photo.mask_path == photo.path]
    if cut_out and len(bare) + len(cut_out) < len(photos):
        warnings.warn(
            f"{counted(len(cut_out), 'image')} of {len(photos)} without a mask file: the alpha "
            f"channel is the mask, so transparent parts are not learned: {listing(cut_out, 5)}; "
            "give a mask file, or save without transparency, to learn more",
            stacklevel=4,
        )


def said_of_transparency(photos: Sequence[Photo]) -> str:
    """What to say of images whose transparent parts became white; empty where there are none."""
    names = [photo.path.name for photo in photos if photo.has_transparency]
    if not names:
        return ""
    return f"transparent parts of {counted(len(names), 'image')} are white: {listing(names, 5)}"


def warn_of_unused_masks(photos: Sequence[Photo]) -> None:
    """Say that masks lie beside photos and are not read, and what became of transparent parts."""
    if transparent := said_of_transparency(photos):
        warnings.warn(
            f"{transparent}; they are learned as a white background: masked_loss leaves them out, "
            "or save the images without transparency",
            stacklevel=3,
        )
    count = sum(mask_path(photo.path).is_file() for photo in photos)
    if count:
        warnings.warn(
            f"{counted(count, 'mask file')} (NAME{MASK_SUFFIX}) beside the images "
            f"{'has' if count == 1 else 'have'} no effect because masked_loss is off",
            stacklevel=3,
        )
