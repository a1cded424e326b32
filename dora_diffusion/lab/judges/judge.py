"""Judging images of the toy world: what do they show, and which subject is it?

The judges are networks trained on renders (`lab.toy.instrument`); on anything but the toy world
their answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.data.sheets import center_square
from dora_diffusion.lab.toy.instrument import ATTRIBUTES, Instrument

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGED_SIZE = 64


@dataclass(frozen=True)
class Judgement:
    """What the judges say of n images.

    Attributes:
        pixels: ``(n, 3, 64, 64)`` in [0, 1].
        identity: ``(n, d)`` unit vectors: alike for one subject wherever it is.
        features: ``(n, d)`` unit vectors: alike for images that look alike.
        answers: Attribute ("kind", "color", "pattern", "background") -> n values.
    """

    pixels: Tensor
    identity: Tensor
    features: Tensor
    answers: dict[str, list[str]]


def judged_pixels(images: Sequence[Image]) -> Tensor:
    """Images of any size -> (n, 3, 64, 64) in [-1, 1], from the centre square.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("no images to judge")
    squares = []
    for image in images:
        square = center_square(image)
        if square.width != JUDGED_SIZE:
            square = square.resize((JUDGED_SIZE, JUDGED_SIZE), resample=4)  # PIL's BOX: the mean
        squares.append(np.asarray(square, np.float32))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def judge(instrument: Instrument, images: Sequence[Image]) -> Judgement:
    """Let the judges look at images.

    Raises:
        ValueError: there is no image.
    """
    pixels = judged_pixels(images)
    logits = instrument.classifier(pixels)
    answers = {
        name: [ATTRIBUTES[name][choice] for choice in logits[name].argmax(1).tolist()]
        for name in ATTRIBUTES
    }
    features = F.normalize(instrument.classifier.trunk(pixels), dim=1)
    return Judgement((pixels + 1) / 2, instrument.embedder(pixels), features, answers)


def similarity(vectors: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each unit vector (n, d) to all references (m, d): (n,)."""
    return (vectors @ references.T).mean(1)
