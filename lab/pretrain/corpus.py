"""Training data of a diffusion model: numbered images with captions, one corpus per model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.toy.world import Scene, render
from lab.pretrain.captions import caption
from lab.pretrain.data import (
    CAPTIONED,
    SIZE,
    open_images,
    training_image,
    training_scene,
)
from lab.pretrain.views import render_view, training_captions, training_view

CAPTIONS_PER_IMAGE = 4
CAPTION_SEED = 15


@dataclass(frozen=True)
class Corpus:
    """Images and captions by number; everything follows from the number alone.

    Attributes:
        count: how many images there are.
        images: (work folder, first, end) -> (end - first, side, side, 3) uint8.
        scene: number -> what the image shows.
        captions: number -> `CAPTIONS_PER_IMAGE` true captions.
        time_ids: number -> SDXL's sizes and crop; None for a model that is told none.
    """

    count: int
    images: Callable[[Path, int, int], NDArray[np.uint8]]
    scene: Callable[[int], Scene]
    captions: Callable[[int], list[str]]
    time_ids: Callable[[int], tuple[int, ...]] | None = None


def _stored_images(folder: Path, first: int, end: int) -> NDArray[np.uint8]:
    stored: NDArray[np.uint8] = open_images(folder)[first:end].numpy()
    return stored


def _plain_captions(index: int) -> list[str]:
    generator = np.random.default_rng((CAPTION_SEED, index))
    scene, name = training_image(index)
    return [caption(scene, generator, name) for _ in range(CAPTIONS_PER_IMAGE)]


def _view_images(folder: Path, first: int, end: int) -> NDArray[np.uint8]:
    return np.stack([render_view(training_view(index)) for index in range(first, end)])


def _view_scene(index: int) -> Scene:
    return training_view(index).cropped_scene


def _view_captions(index: int) -> list[str]:
    return training_captions(index, CAPTIONS_PER_IMAGE)


def _view_time_ids(index: int) -> tuple[int, ...]:
    return training_view(index).time_ids


def _drawn_images(folder: Path, first: int, end: int) -> NDArray[np.uint8]:
    return np.stack([render(training_scene(index), SIZE) for index in range(first, end)])


SD = Corpus(CAPTIONED, _stored_images, training_scene, _plain_captions)
SD_EPSILON = Corpus(24_000, _drawn_images, training_scene, _plain_captions)
SDXL = Corpus(40_000, _view_images, _view_scene, _view_captions, _view_time_ids)
FLOW = Corpus(56_000, _drawn_images, training_scene, _plain_captions)
