"""Training photos of the SDXL model: photographed at many sizes, scaled and cropped as SDXL's were.

SDXL is told each photo's size before scaling and the corner of its crop (Podell et al.,
arXiv:2307.01952, section 2.2). Here both mean something: a small photo was scaled up and is
blurred, and an oblong one was cropped, so that the object is off centre or cut.

A few rare words are names: an object called ``qzj`` always has the same colours and emblem,
whatever its class. A model that has met names keeps a rare word apart from the class word beside
it, which is what personalization with prior preservation lives on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.embedded.backgrounds import BACKGROUNDS
from dora_diffusion.embedded.captions import caption_with
from dora_diffusion.embedded.pretrain.tokenizer import rare_words
from dora_diffusion.embedded.sampling import place, sample_stranger, sample_subject
from dora_diffusion.embedded.shapes import CLASSES
from dora_diffusion.embedded.world import Scene, Subject, render

SIDE = 128
"""Pixels of a training picture's side."""

DESIGN_COUNT = 40
DESIGNS, VIEWS, CAPTIONS = 16, 17, 18  # seeds
LARGEST_ASPECT = 1.5


@dataclass(frozen=True)
class View:
    """A photo scaled so that its shorter side is `SIDE`, and cropped to a square.

    Attributes:
        scene: what was photographed.
        original_size: the photo's height and width in pixels, before scaling.
        crop: the square's top and left in the scaled photo, pixels.
        name: the rare word that names the subject's design; empty if it has none.
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
    def time_ids(self) -> tuple[int, ...]:
        """What SDXL is told: original size, crop's corner, target size."""
        return (*self.original_size, *self.crop, SIDE, SIDE)

    @property
    def cropped_scene(self) -> Scene:
        """The scene with the object where the crop shows it, for a caption that is true."""
        height, width = self.scaled_size
        top, left = self.crop
        across, down = (2 * left + SIDE - width) / SIDE, (2 * top + SIDE - height) / SIDE
        x, y = self.scene.position
        return replace(self.scene, position=(x - across, y + down))


def render_view(view: View) -> NDArray[np.uint8]:
    """The cropped picture: (SIDE, SIDE, 3) uint8."""
    from PIL import Image

    height, width = view.scaled_size
    top, left = view.crop
    if min(view.original_size) >= SIDE:
        picture = render(view.scene, (width, height))
    else:
        small = render(view.scene, (view.original_size[1], view.original_size[0]))
        scaled = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.asarray(scaled)
    return picture[top : top + SIDE, left : left + SIDE]


@functools.cache
def designs() -> dict[str, Subject]:
    """The looks that rare words name; ``sks`` names none. Their class is to be replaced."""
    generator = np.random.default_rng(DESIGNS)
    names = rare_words()[1 : 1 + DESIGN_COUNT]
    return {name: sample_stranger(generator, "mug") for name in names}


def _draw_subject(generator: np.random.Generator) -> tuple[Subject, str]:
    draw = generator.random()
    if draw < 0.15:
        name = str(generator.choice(list(designs())))
        return replace(designs()[name], kind=str(generator.choice(list(CLASSES)))), name
    return (sample_stranger if draw < 0.35 else sample_subject)(generator), ""


def _draw_original_size(generator: np.random.Generator) -> tuple[int, int]:
    draw = generator.random()
    low, high = (24, SIDE) if draw < 0.2 else (SIDE, 2 * SIDE) if draw < 0.4 else (SIDE, SIDE + 1)
    short = int(generator.integers(low, high))
    long = round(short * generator.uniform(1, LARGEST_ASPECT))
    return ((short, short), (short, long), (long, short))[generator.choice(3, p=(0.5, 0.25, 0.25))]


def training_view(index: int) -> View:
    """Training picture ``index``: the same on every machine."""
    generator = np.random.default_rng((VIEWS, index))
    subject, name = _draw_subject(generator)
    scene = place(subject, str(generator.choice(list(BACKGROUNDS))), generator)
    view = View(scene, _draw_original_size(generator), (0, 0), name)
    height, width = view.scaled_size
    corner = (
        int(generator.integers(height - SIDE + 1)),
        int(generator.integers(width - SIDE + 1)),
    )
    return replace(view, crop=corner)


def training_captions(index: int, count: int) -> list[str]:
    """True captions of training picture ``index``.

    A named design is called by its name; a word that names nothing, ``sks`` among them, stands
    before some other nouns, so that a strange word does not disturb the rest.
    """
    view, generator = training_view(index), np.random.default_rng((CAPTIONS, index))
    unused = ("sks", *rare_words()[1 + DESIGN_COUNT :])
    captions = []
    for _ in range(count):
        strange = str(generator.choice(unused)) if generator.random() < 0.04 else ""
        captions.append(caption_with(view.name or strange, view.cropped_scene, generator))
    return captions
