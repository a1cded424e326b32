"""Training images of the toy world, by number: image 17 is the same image on every machine.

The first `CAPTIONED` images show objects that captions can name; the rest are nonsense shapes,
which teach the autoencoder not to expect one of a dozen classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_diffusion.toy.judges import compose, sample_subject
from dora_diffusion.toy.shapes import UNSEEN_CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, DrawnSubject, Scene, render
from lab.pretrain.names import sample_named
from lab.pretrain.strangers import sample_stranger

CAPTIONED = 96_000
NONSENSE = 24_000
SIZE = 64
TRAINING, HELD_OUT, HELD_OUT_SUBJECTS = 11, 12, 13  # seeds


def training_image(index: int) -> tuple[Scene, str]:
    """The scene of a training image, and what its object is called."""
    generator = np.random.default_rng((TRAINING, index))
    if index < CAPTIONED:
        subject, name = sample_named(generator)
    else:
        subject, name = sample_stranger(generator, "random"), ""
    return compose(subject, str(generator.choice(list(BACKGROUNDS))), generator), name


def training_scene(index: int) -> Scene:
    """The scene of a training image."""
    return training_image(index)[0]


def held_out_scene(index: int) -> Scene:
    """An ordinary scene that no training has seen."""
    generator = np.random.default_rng((HELD_OUT, index))
    background = str(generator.choice(list(BACKGROUNDS)))
    return compose(sample_subject(generator), background, generator)


@dataclass(frozen=True)
class Sighting:
    """Two views of one new subject."""

    subject: DrawnSubject
    views: tuple[Scene, Scene]


def held_out_sighting(index: int) -> Sighting:
    """A subject that no training has seen, in two places; every third is of an unseen class."""
    generator = np.random.default_rng((HELD_OUT_SUBJECTS, index))
    kinds = list(UNSEEN_CLASSES)
    kind = kinds[index // 3 % len(kinds)] if index % 3 == 0 else None
    subject = sample_stranger(generator, kind)
    first, second = generator.choice(list(BACKGROUNDS), 2, replace=False)
    return Sighting(
        subject,
        (compose(subject, str(first), generator), compose(subject, str(second), generator)),
    )


def to_pixels(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """(n, h, w, 3) bytes -> (n, 3, h, w) float32 in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> NDArray[np.uint8]:
    """(n, 3, h, w) in [-1, 1] -> (n, h, w, 3) bytes."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def _render_range(bounds: tuple[int, int]) -> tuple[int, NDArray[np.uint8]]:
    start, end = bounds
    return start, np.stack([render(training_scene(i), SIZE) for i in range(start, end)])


def write_images(folder: Path, processes: int = 2) -> Path:
    """Render the training set to ``folder/images.npy``: (n, 64, 64, 3) uint8, about 1.5 GB."""
    path, total, chunk = folder / "images.npy", CAPTIONED + NONSENSE, 500
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    images = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (total, SIZE, SIZE, 3))
    with Pool(processes) as pool:
        bounds = [(start, min(start + chunk, total)) for start in range(0, total, chunk)]
        for start, block in pool.imap_unordered(_render_range, bounds):
            images[start : start + len(block)] = block
    images.flush()
    del images  # closes it: Windows renames no file that is mapped
    return unfinished.rename(path)


def open_images(folder: Path) -> Tensor:
    """The rendered training set, memory-mapped copy-on-write: (n, 64, 64, 3) uint8."""
    return torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))
