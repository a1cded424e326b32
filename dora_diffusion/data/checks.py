"""Warnings before training: photos that are few, small, blurred or nearly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo

if TYPE_CHECKING:
    from PIL import Image as PILImage

FEWEST, MOST = 3, 30
WANTED = f"{FEWEST} to {MOST} photos, from different sides and in different places"
# Sharp photos of the DreamBooth dataset measure 0.18 to 0.36; blurred by 3 pixels, 0.58 and more.
BLURRED = 0.55
# Differing bits, of 64, below which two photos look the same (a copy, resized or re-encoded).
NEAR_DUPLICATE_BITS = 6


@dataclass(frozen=True)
class PhotoWarning:
    """Something about the photos that will show in the result.

    Attributes:
        kind: What is wrong.
        names: Files it is about; empty for the set as a whole.
        message: One line with what to do.
    """

    kind: Literal["few", "many", "small", "blurred", "duplicate"]
    names: tuple[str, ...]
    message: str


def check_photos(photos: Sequence[Photo], resolution: int) -> list[PhotoWarning]:
    """Look for what commonly spoils a run; none of it stops one.

    Args:
        photos: The verified photos.
        resolution: Side that they will be trained at.
    """
    warnings = _check_count(len(photos))
    hashes: dict[str, Tensor] = {}
    for photo in photos:
        name, (height, width) = photo.path.name, photo.size
        if min(height, width) < resolution:
            message = (
                f"{name}: {width} x {height} is smaller than the training size {resolution} and "
                "will be enlarged; use a larger photo"
            )
            warnings.append(PhotoWarning("small", (name,), message))
        image = open_photo(photo.path).convert("L")
        if blur(image) > BLURRED:
            message = f"{name}: looks blurred, and the subject will too; use a sharper photo"
            warnings.append(PhotoWarning("blurred", (name,), message))
        hashes[name] = difference_hash(image)
    for names in near_duplicates(hashes):
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        message = f"{listed} are nearly the same photo; keep one of them"
        warnings.append(PhotoWarning("duplicate", names, message))
    return warnings


def near_duplicates(hashes: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Groups of photos that look the same, each joined to the group by one of it.

    Args:
        hashes: Name -> `difference_hash`.
    """
    group_of = {name: [name] for name in hashes}
    for (first, left), (second, right) in combinations(hashes.items(), 2):
        mine, other = group_of[first], group_of[second]
        if mine is not other and int((left != right).sum()) < NEAR_DUPLICATE_BITS:
            mine.extend(other)
            group_of.update(dict.fromkeys(other, mine))
    order = {name: place for place, name in enumerate(hashes)}
    groups = {id(group): group for group in group_of.values() if len(group) > 1}
    return [tuple(sorted(group, key=order.__getitem__)) for group in groups.values()]


def _check_count(count: int) -> list[PhotoWarning]:
    if count < FEWEST:
        message = (
            f"only {count} photo{'s' if count != 1 else ''}: the result will repeat them; "
            f"use {WANTED}"
        )
        return [PhotoWarning("few", (), message)]
    if count > MOST:
        message = f"{count} photos: more than {MOST} rarely help; choose the best"
        return [PhotoWarning("many", (), message)]
    return []


def blur(image: PILImage.Image, side: int = 512) -> float:
    """How blurred a grey image is, from 0 (sharp) to 1: Crete et al. 2007, "The Blur Effect".

    Blurring a sharp image changes it much, a blurred one little. The worse direction counts.

    Args:
        image: A grey image ("L").
        side: The image is brought to this shorter side first, so that sizes compare.
    """
    from PIL import Image

    scale = side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    grey = _grey(image.resize(size, Image.Resampling.LANCZOS))
    return max(_blur_along_rows(grey), _blur_along_rows(grey.T.contiguous()))


def _blur_along_rows(grey: Tensor) -> float:
    smooth = torch.nn.functional.avg_pool1d(
        grey.unsqueeze(1), 9, stride=1, padding=4, count_include_pad=False
    ).squeeze(1)
    change = grey.diff(dim=1).abs()
    total = change.sum()
    if total == 0:  # a flat image has no edge that could be sharp
        return 0.0
    lost = (change - smooth.diff(dim=1).abs()).clamp(min=0)
    return float((total - lost.sum()) / total)


def difference_hash(image: PILImage.Image) -> Tensor:
    """64 bits ``(8, 8)`` of a grey image: whether brightness rises from pixel to pixel.

    They hardly change under resizing, re-encoding and brightness.
    """
    from PIL import Image

    return _grey(image.resize((9, 8), Image.Resampling.LANCZOS)).diff(dim=1) > 0


def _grey(image: PILImage.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width).float()
