"""Crops of photos, and the record of each: what SDXL conditions on and what caches key by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dora_diffusion.data.decoding import REDUCTIONS


@dataclass(frozen=True)
class CropRecord:
    """Crop that turns a photo into training pixels. All pairs are (height, width) or (top, left).

    Attributes:
        original_size: Upright size of the photo's file.
        crop_top_left: Corner of the crop in the resized (and, if so, flipped) photo.
        target_size: Size of the crop.
        flipped: Mirrored left to right, before the crop.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    flipped: bool = False

    @property
    def resized_size(self) -> tuple[int, int]:
        """Size of the photo after resizing: it just covers the crop."""
        return covering_size(self.original_size, self.target_size)


def covering_size(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the original's shape that covers the target, ``(height, width)``.

    For a square target the shorter side becomes the target's side.
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
    """Decide on a crop without touching pixels.

    Args:
        original_size: ``(height, width)`` of the upright photo.
        resolution: Side of the square crop, or its ``(height, width)``.
        generator: Draws the place; None takes the middle.
        multiple: The autoencoder's pixels per latent; both sides must be multiples of it.

    Raises:
        ValueError: If the resolution does not fit.
    """
    target = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(target) < multiple or any(side % multiple for side in target):
        shown = " x ".join(map(str, dict.fromkeys(target[::-1])))
        raise ValueError(
            f"resolution {shown} must be a multiple of {multiple}, the model's pixels per "
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
    """Resize (Lanczos), flip and crop an image or mask as the record says.

    Args:
        image: The photo, at its own size or with its sides divided by one of `REDUCTIONS`.
        record: Planned for the photo's own size.

    Raises:
        ValueError: If the record is of an image of another size.
    """
    own = record.original_size
    sizes = {(math.ceil(own[0] / factor), math.ceil(own[1] / factor)) for factor in REDUCTIONS}
    if (image.height, image.width) not in sizes:
        raise ValueError(
            f"the crop was planned for a photo of {record.original_size}, "
            f"this one is {(image.height, image.width)}"
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
    """Cut a mask ("L") with its photo's record to ``(1, H, W)`` float32 in [0, 1]."""
    return _pixels(cut(mask, record), 1).div(255.0)


def latent_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """The share of each latent's pixels that a mask covers: ``(..., 1, H, W) -> (..., 1, h, w)``.

    A mask of that size comes back bit for bit.
    """
    return nn.functional.adaptive_avg_pool2d(mask, (size[0], size[1]))


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """Values from 0 to 255 as ``(channels, H, W)`` float32."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1).float()


@dataclass(frozen=True)
class Buckets:
    """Crop sizes around a resolution; calling one picks a photo's.

    Every size has sides that are multiples of ``step`` and an area of at most
    ``resolution ** 2``, so no bucket needs more memory than the square one. Sizes and choice are
    those of sd-scripts for the same sides, which has 256 and 1024 unless told otherwise.

    Attributes:
        resolution: Side of the square bucket in pixels.
        step: Sides are multiples of this; a multiple of the model's pixels per latent.
        shortest: Least side, rounded down to a multiple; None means half of the greatest.
        longest: Greatest side, rounded up to a multiple; None means sqrt(2) times the resolution.

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
        """The least and the greatest side, as multiples of the step."""
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
        """The bucket nearest to a photo's ``(height, width)`` by width / height."""
        wanted = size[1] / size[0]
        return min(self.sizes, key=lambda bucket: abs(bucket[1] / bucket[0] - wanted))
