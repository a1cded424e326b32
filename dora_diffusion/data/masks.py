"""Checks of masks before a run: whether there are any, and whether they leave anything to learn."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dora_diffusion.data.crops import CropRecord, apply_crop_to_mask
from dora_diffusion.data.images import MASK_SUFFIX, PhotoError, read_bytes
from dora_diffusion.data.photos import Photo, open_mask
from dora_diffusion.wording import counted


def mask_path(photo: Path) -> Path:
    """Where an image's mask lies: ``NAME.mask.png``."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def mask_digest(photo: Photo) -> str:
    """Digest of an image's mask file; empty where it has none (alpha is part of the image)."""
    path = mask_path(photo.path)
    return hashlib.sha256(read_bytes(path)).hexdigest()[:32] if path.is_file() else ""


def check_masks(photos: Sequence[Photo], crops: Callable[[Photo], Iterable[CropRecord]]) -> None:
    """Refuse masks from which nothing would be learned.

    Args:
        photos: The verified images.
        crops: The crops that an image will be trained on, or some of them.

    Raises:
        PhotoError: If no image has a mask, or a mask is black wherever it is looked at.

    Warns:
        UserWarning: Of images without a mask beside others that have one.
    """
    bare = []
    for photo in photos:
        mask = open_mask(photo)
        if mask is None:
            bare.append(photo.path.name)
        elif not any(apply_crop_to_mask(mask, crop).any() for crop in crops(photo)):
            file = mask_path(photo.path)
            where = file.name if file.is_file() else f"the alpha channel of {photo.path.name}"
            raise PhotoError(
                f"{where} is black in every crop that is trained on, so nothing of "
                f"{photo.path.name} would be learned; make bright what to learn, or remove it"
            )
    if len(bare) == len(photos):
        first = photos[0].path
        raise PhotoError(
            f"masked_loss is on, but none of the {counted(len(photos), 'image')} has a mask: the "
            f"mask of {first.name} is {mask_path(first).name} beside it, of the same size and "
            "bright where to learn; or give images with an alpha channel"
        )
    if bare:
        warnings.warn(
            f"{counted(len(bare), 'image')} of {len(photos)} without a mask, whose whole area is "
            f"learned: {', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}",
            stacklevel=3,
        )


def warn_of_unused_masks(paths: Sequence[Path]) -> None:
    """Say that masks lie beside images and are not read."""
    found = sum(mask_path(path).is_file() for path in paths)
    if found:
        warnings.warn(
            f"{counted(found, 'mask file')} (NAME{MASK_SUFFIX}) beside the images "
            f"{'has' if found == 1 else 'have'} no effect because masked_loss is off",
            stacklevel=3,
        )
