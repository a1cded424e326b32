"""Crops of photos, with records for SDXL's size conditioning and for cache keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn


@dataclass(frozen=True)
class CropRecord:
    """Crop of a photo to training pixels. All pairs are (height, width) or (top, left).

    Attributes:
        original_size: Upright size of the photo's file.
        crop_top_left: Corner of the crop in the resized (and possibly flipped) photo.
        target_size: Size of the crop.
        flipped: The photo is mirrored left to right before the crop.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    flipped: bool = False

    @property
    def resized_size(self) -> tuple[int, int]:
        """Size of the resized photo, which just covers the crop."""
        return covering_size(self.original_size, self.target_size)


def covering_size(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest ``(height, width)`` with the original's aspect ratio that covers the target.

    For a square target, the shorter side becomes the target's side.
    """
    scale = max(target[0] / original[0], target[1] / original[1])
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))


def plan_crop(
    original_size: tuple[int, int],
    resolution: int | tuple[int, int],
    *,
    generator: torch.Generator | None = None,
    multiple: int = 8,
) -> CropRecord:
    """Plan a crop without reading pixels.

    Args:
        original_size: ``(height, width)`` of the upright photo.
        resolution: Side of the square crop, or its ``(height, width)``.
        generator: Draws the position of the crop; None: center crop.
        multiple: Pixels per latent of the autoencoder; both sides must be multiples of it.

    Raises:
        ValueError: If the resolution is not a multiple of ``multiple``.
    """
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(target) < multiple or any(side % multiple for side in target):
        size = " x ".join(map(str, dict.fromkeys(target[::-1])))
        raise ValueError(
            f"resolution {size} must be a multiple of {multiple}, the model's pixels per "
            f"latent; try {max(1, round(target[0] / multiple)) * multiple}"
        )
    height, width = covering_size(original_size, target)
    rows, columns = height - target[0], width - target[1]
    if generator is None:
        return CropRecord(original_size, (rows // 2, columns // 2), target)
    down, right = torch.rand(2, generator=generator).tolist()
    top, left = min(rows, int(down * (rows + 1))), min(columns, int(right * (columns + 1)))
    return CropRecord(original_size, (top, left), target)


def cut(image: Image.Image, record: CropRecord) -> Image.Image:
    """Resize (Lanczos), flip and crop an image or mask by a record.

    Args:
        image: The photo, at its original size or with its sides halved.
        record: Crop planned for the photo's original size.

    Raises:
        ValueError: If the record was planned for another size.
    """
    original = record.original_size
    halved = (math.ceil(original[0] / 2), math.ceil(original[1] / 2))
    if (image.height, image.width) not in (original, halved):
        raise ValueError(
            f"the crop was planned for a photo of {record.original_size}, "
            f"but this photo is {(image.height, image.width)}"
        )
    height, width = record.resized_size
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    if record.flipped:
        resized = ImageOps.mirror(resized)
    (top, left), (rows, columns) = record.crop_top_left, record.target_size
    return resized.crop((left, top, left + columns, top + rows))


def apply_crop(image: Image.Image, record: CropRecord) -> Tensor:
    """Cut an RGB photo to pixels ``(3, H, W)`` float32 in [-1, 1]."""
    return _pixels(cut(image, record), 3).div(127.5).sub(1.0).contiguous()


def apply_crop_to_mask(mask: Image.Image, record: CropRecord) -> Tensor:
    """Cut a mask ("L") by its photo's record to ``(1, H, W)`` float32 in [0, 1]."""
    return _pixels(cut(mask, record), 1).div(255.0)


def latent_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Average a mask over the pixels of each latent: ``(..., 1, H, W) -> (..., 1, h, w)``.

    A mask that already has the target size is returned with the same values.
    """
    return nn.functional.adaptive_avg_pool2d(mask, (size[0], size[1]))


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """Values from 0 to 255 as ``(channels, H, W)`` float32."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1).float()


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets: crop sizes around a resolution; a call returns the bucket of a photo.

    All sides are multiples of ``step``, and areas are at most ``resolution ** 2``, so no bucket
    needs more memory than the square one. Sizes and choice match sd-scripts with the same minimum
    and maximum side (its defaults are 256 and 1024).

    Attributes:
        resolution: Side of the square bucket in pixels.
        step: Divisor of all sides; a multiple of the model's pixels per latent.
        shortest: Minimum side, rounded down to a multiple; None: half of the maximum.
        longest: Maximum side, rounded up to a multiple; None: sqrt(2) times the resolution.

    Raises:
        ValueError: If no such sizes exist.
    """

    resolution: int
    step: int = 64
    shortest: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or self.resolution < self.step or self.resolution % self.step:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of the bucket step {self.step}"
            )
        least, greatest = self.sides
        if not 0 < least <= self.resolution <= greatest:
            raise ValueError(
                f"the sides of buckets, {least} to {greatest}, must begin at {self.step} or more "
                f"and include the resolution {self.resolution}"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Minimum and maximum side, as multiples of the step."""
        greatest = int(self.resolution * math.sqrt(2)) // self.step
        if self.longest is not None:
            greatest = math.ceil(self.longest / self.step)
        least = min(math.ceil(greatest / 2), self.resolution // self.step)
        if self.shortest is not None:
            least = self.shortest // self.step
        return least * self.step, greatest * self.step

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes ``(height, width)``, from the narrowest to the widest."""
        (least, greatest), sizes = self.sides, set()
        for side in range(least, greatest + 1, self.step):
            other = min(greatest, self.resolution**2 // side // self.step * self.step)
            if other >= least:
                sizes |= {(side, other), (other, side)}
        return tuple(sorted(sizes, key=lambda size: size[::-1]))

    def __call__(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the bucket with the aspect ratio nearest to a photo's ``(height, width)``."""
        aspect_ratio = size[1] / size[0]
        return min(self.sizes, key=lambda bucket: abs(bucket[1] / bucket[0] - aspect_ratio))
