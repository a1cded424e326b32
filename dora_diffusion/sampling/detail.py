"""Detail pass: a face or a subject is found, enlarged, painted over, and put back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageFilter

from dora_diffusion.config.fields import require
from dora_diffusion.config.prompts import DETAIL_DENOISE, DETAIL_PADDING, LEAST_PADDING, PIXELS

if TYPE_CHECKING:
    from dora_diffusion.data.prepare import Masker

# The blur ends within the padding, so that a crop has no edge.
FEATHER = LEAST_PADDING // 4
"""Radius in pixels of the blur by which a mask's edge is softened."""
NO_PASS = "it has no detail pass"
"""End of the warning of an image in which nothing is found."""


@dataclass(frozen=True)
class Detail:
    """Settings of the detail pass: the model that finds the region, and how it is painted over.

    Attributes:
        mask: Finds it: an RGB image -> "L" of its size, bright where it is (`open_masker`).
        denoise: Denoising strength.
        padding: Pixels around it that are seen too.
        prompt: Of it; empty: the image's.
        model: Name of what makes the mask, for an image's text.
        label: What that model is to find, for an image's text.

    Raises:
        ConfigError: If a value cannot work.
    """

    mask: Masker = field(repr=False)
    denoise: float = DETAIL_DENOISE
    padding: int = DETAIL_PADDING
    prompt: str = ""
    model: str = ""
    label: str = ""

    @classmethod
    def open(cls, model: str, label: str, **settings: Any) -> Detail:
        """Open the model that makes the mask.

        Args:
            model: As `open_masker` takes it.
            label: Of what it is to find; empty: the only one.
            settings: Denoising strength, padding and prompt.

        Raises:
            PrepareError, ModelNotFoundError: If it gives no masks, or is not there.
        """
        from dora_diffusion.data.prepare import open_masker

        return cls(open_masker(model, label=label), model=model, label=label, **settings)

    def __post_init__(self) -> None:
        require(
            0 < self.denoise <= 1,
            f"detail_denoise is {self.denoise:g}; it must be above 0 and at most 1",
            "detail_denoise",
        )
        require(
            self.padding >= LEAST_PADDING,
            f"detail_padding is {self.padding}; it must be at least {LEAST_PADDING}",
            "detail_padding",
        )


class Region(NamedTuple):
    """A part of an image that is painted again.

    Attributes:
        box: Its left, top, right and bottom in the image.
        size: Width and height that it is painted at.
        feather: The softened mask, of the box's size; 0 where the image stays.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    feather: Image.Image

    def crop(self, image: Image.Image) -> Image.Image:
        """The region of an image at the size that it is painted at."""
        return image.crop(self.box).resize(self.size, Image.Resampling.LANCZOS)

    @property
    def mask(self) -> Image.Image:
        """White where the region is painted, of the size that it is painted at."""
        reached = self.feather.point([0] + [255] * 255)
        return reached.resize(self.size, Image.Resampling.NEAREST)

    def put_back(self, painted: Image.Image, image: Image.Image) -> Image.Image:
        """The image with the painted region in it; pixels where the feather is 0 stay as they are.

        Args:
            painted: Of the size that it was painted at.
            image: The image.
        """
        part = painted.resize(self.feather.size, Image.Resampling.LANCZOS)
        whole = image.copy()
        whole.paste(part, self.box[:2], self.feather)
        return whole


def find_region(
    image: Image.Image, detail: Detail, resolution: int, step: int = PIXELS
) -> Region | None:
    """Find what is painted again; None where the mask is bright nowhere.

    The region is square where the image is large enough, and enlarged to the area that the model
    was trained at; one that is larger than that already keeps its size.

    Args:
        image: RGB.
        detail: What to find.
        resolution: Side in pixels that the model was trained at.
        step: Number of pixels of which sides are multiples.
    """
    mask = detail.mask(image)
    found = mask.point([0] * 128 + [255] * 128).getbbox()
    if found is None:
        return None
    spans = [
        (max(0, found[axis] - detail.padding), min(side, found[axis + 2] + detail.padding))
        for axis, side in enumerate(image.size)
    ]
    side = max(end - start for start, end in spans)
    spans = [_widened(span, side, most) for span, most in zip(spans, image.size, strict=True)]
    (left, right), (top, bottom) = spans
    width, height = right - left, bottom - top
    scale = max(1.0, resolution / math.sqrt(width * height))
    size = [max(step, round(side * scale / step) * step) for side in (width, height)]
    box = (left, top, right, bottom)
    feather = mask.filter(ImageFilter.GaussianBlur(FEATHER)).crop(box)
    return Region(box, (size[0], size[1]), feather)


def _widened(span: tuple[int, int], wanted: int, most: int) -> tuple[int, int]:
    """A span of at least so many pixels around its middle, within an image's side."""
    length = min(max(wanted, span[1] - span[0]), most)
    start = (span[0] + span[1] - length) // 2
    start = min(max(0, start), most - length)
    return start, start + length
