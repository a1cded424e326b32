"""Verified photos with their captions and masks: the subject's, and class images beside them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.images import (
    MASK_SUFFIX,
    PhotoError,
    has_alpha_mask,
    list_photos,
    open_photo,
    open_photo_with_alpha,
    verify_photo,
)
from dora_diffusion.wording import counted

if TYPE_CHECKING:
    from PIL import Image as PILImage


@dataclass(frozen=True)
class Photo:
    """A verified photo: where it is, what it shows, and its digest and upright (height, width)."""

    path: Path
    caption: str
    sample_id: str
    size: tuple[int, int]


def open_mask(photo: Photo) -> PILImage.Image | None:
    """The mask file ("L") beside a photo, else its alpha channel where that hides anything.

    Raises:
        PhotoError: If the file cannot be used, or is not of the photo's size.
    """
    path = photo.path.with_name(photo.path.stem + MASK_SUFFIX)
    if path.is_file():
        mask = open_photo(path).convert("L")
        if (mask.height, mask.width) != photo.size:
            raise PhotoError(
                f"{path.name}: the mask is {mask.width} x {mask.height}, its photo "
                f"{photo.size[1]} x {photo.size[0]}; save it at the photo's size"
            )
        return mask
    alpha = open_photo_with_alpha(photo.path)[1]
    return alpha if has_alpha_mask(alpha) else None


def read_photos(
    paths: Sequence[Path], prompt: str, *, skip_unreadable: bool = False, use_masks: bool = False
) -> tuple[list[Photo], list[str]]:
    """Verify photos by decoding each once, and read their captions.

    Args:
        paths: The photos.
        prompt: Caption of photos without a caption file.
        skip_unreadable: Leave bad photos out with a warning each, instead of failing.
        use_masks: Verify their masks too; a photo with a bad mask is bad.

    Returns:
        The good photos, and the reasons for those left out.

    Raises:
        PhotoError: If a photo is bad (all reasons in one line), or none is left.
    """
    photos: list[Photo] = []
    reasons: list[str] = []
    for path in paths:
        try:
            info = verify_photo(path)
            photo = Photo(path, read_caption(path, prompt), info.digest, info.size)
            if use_masks:
                open_mask(photo)
        except PhotoError as error:
            reasons.append(str(error))
        else:
            photos.append(photo)
    if reasons and not (skip_unreadable and photos):
        total = counted(len(paths), "photo")
        raise PhotoError(f"{len(reasons)} of {total} unusable: {'; '.join(reasons)}")
    for reason in reasons:
        warnings.warn(f"photo left out: {reason}", stacklevel=3)
    return photos, reasons


class ClassImages:
    """A folder of class images for prior preservation, each with the prompt that made it.

    The prompt of image ``i`` is the ``.txt`` beside it, else the class prompt.
    """

    def __init__(
        self,
        images: str | Path | Sequence[Path],
        class_prompt: str,
        *,
        skip_unreadable: bool = False,
    ) -> None:
        """Verify the images: a folder's, or those that are listed.

        Raises:
            PhotoError: If there is none, or one is bad and ``skip_unreadable`` is off.
        """
        paths = list_photos(images) if isinstance(images, (str, Path)) else list(images)
        self.photos, self.skipped = read_photos(
            paths, class_prompt, skip_unreadable=skip_unreadable
        )

    def __len__(self) -> int:
        """Number of class images."""
        return len(self.photos)

    def __getitem__(self, index: int) -> Photo:
        """One class image."""
        return self.photos[index]
