"""What photos look like, in two numbers: how blurred one is, and which look the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as PILImage


@dataclass(frozen=True)
class Appearance:
    """How blurred a photo is (see `blur`), and 64 bits of what it shows (see `fingerprint`)."""

    blur: float
    fingerprint: int


def appearance_of(image: PILImage.Image) -> Appearance:
    """Measure an image."""
    grey = image.convert("L")
    return Appearance(blur(grey), fingerprint(grey))


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
    pixels = bytearray(image.resize(size, Image.Resampling.LANCZOS).tobytes())
    grey = torch.frombuffer(pixels, dtype=torch.uint8).view(size[1], size[0]).float()
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


def fingerprint(image: PILImage.Image) -> int:
    """64 bits of a grey image: whether brightness rises from pixel to pixel, at 9 x 8 pixels.

    They hardly change under resizing, re-encoding and brightness.
    """
    from PIL import Image

    small = image.resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    rises = [small[9 * y + x + 1] > small[9 * y + x] for y in range(8) for x in range(8)]
    return sum(rise << place for place, rise in enumerate(rises))
