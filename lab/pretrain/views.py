"""Training photos of the SDXL model: photographed at many sizes, scaled and cropped as SDXL's were.

SDXL is told each photo's size before scaling and the corner of its crop (Podell et al.,
arXiv:2307.01952, section 2.2). Here both mean something: a small photo was scaled up and is
blurred, and an oblong one was cropped, so that the object is off centre or cut. In a wide photo the
object stood near the middle, and no caption says on which side it is seen: only the crop does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.toy.judges import compose
from dora_diffusion.toy.world import BACKGROUNDS, Scene, render
from lab.pretrain.captions import caption
from lab.pretrain.names import sample_named

SIDE = 128
"""Pixels of a training image's side."""

VIEWS, CAPTIONS = 17, 18  # seeds
SQUARE, LARGEST_ASPECT = 0.3, 1.5
OFF_THE_MIDDLE = 0.25
"""Offset of an object from the middle of a wide photo, relative to one of a square photo."""


@dataclass(frozen=True)
class View:
    """A photo scaled so that its shorter side is `SIDE`, and cropped to a square.

    Attributes:
        scene: what was photographed.
        original_size: the photo's height and width in pixels, before scaling.
        crop: the square's top and left in the scaled photo, pixels.
        name: the rare word that the subject is called by; empty if it has none.
    """

    scene: Scene
    original_size: tuple[int, int]
    crop: tuple[int, int] = (0, 0)
    name: str = ""

    def __post_init__(self) -> None:
        height, width = self.scaled_size
        top, left = self.crop
        if not (0 <= top <= height - SIDE and 0 <= left <= width - SIDE):
            raise ValueError(f"no crop at {self.crop} in a photo of {self.scaled_size}")

    @property
    def scaled_size(self) -> tuple[int, int]:
        """The photo's height and width after scaling."""
        height, width = self.original_size
        scale = SIDE / min(height, width)
        return max(SIDE, round(height * scale)), max(SIDE, round(width * scale))

    @property
    def is_wide(self) -> bool:
        """True if its crop is one from left to right."""
        height, width = self.original_size
        return width > height

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Time ids of SDXL: original size, crop's corner, target size."""
        return (*self.original_size, *self.crop, SIDE, SIDE)

    @property
    def cropped_scene(self) -> Scene:
        """The scene with the object where the crop shows it."""
        height, width = self.scaled_size
        top, left = self.crop
        across, down = (2 * left + SIDE - width) / SIDE, (2 * top + SIDE - height) / SIDE
        x, y = self.scene.position
        return replace(self.scene, position=(x - across, y + down))


def render_view(view: View) -> NDArray[np.uint8]:
    """The cropped image: (SIDE, SIDE, 3) uint8."""
    from PIL import Image

    height, width = view.scaled_size
    top, left = view.crop
    if min(view.original_size) >= SIDE:
        image = render(view.scene, (width, height))
    else:
        small = render(view.scene, (view.original_size[1], view.original_size[0]))
        scaled = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image = np.asarray(scaled)
    return image[top : top + SIDE, left : left + SIDE]


def _draw_original_size(generator: np.random.Generator) -> tuple[int, int]:
    draw = generator.random()
    low, high = (24, SIDE) if draw < 0.25 else (SIDE, 2 * SIDE) if draw < 0.4 else (SIDE, SIDE + 1)
    short = int(generator.integers(low, high))
    if generator.random() < SQUARE:
        return short, short
    long = round(short * generator.uniform(1, LARGEST_ASPECT))
    return (short, long) if generator.random() < 0.5 else (long, short)


def _draw_corner(room: int, generator: np.random.Generator) -> int:
    """An offset from 0 to ``room``, oftener near the ends, where a crop shows."""
    return min(room, int(generator.beta(0.6, 0.6) * (room + 1)))


def training_view(index: int) -> View:
    """Training image ``index``: the same on every machine."""
    generator = np.random.default_rng((VIEWS, index))
    subject, name = sample_named(generator)
    scene = compose(subject, str(generator.choice(list(BACKGROUNDS))), generator)
    view = View(scene, _draw_original_size(generator), (0, 0), name)
    if view.is_wide:
        x, y = scene.position
        view = replace(view, scene=replace(scene, position=(OFF_THE_MIDDLE * x, y)))
    height, width = view.scaled_size
    top, left = (_draw_corner(length - SIDE, generator) for length in (height, width))
    return replace(view, crop=(top, left))


def training_captions(index: int, count: int) -> list[str]:
    """True captions of training image ``index``."""
    view, generator = training_view(index), np.random.default_rng((CAPTIONS, index))
    scene = view.cropped_scene
    if view.is_wide:
        scene = replace(scene, position=(0.0, scene.position[1]))  # where it is is not told
    return [caption(scene, generator, view.name) for _ in range(count)]
