"""Judging pictures of the toy world: do they show what was asked for, and who is in them?

The judges are networks trained on renders (`embedded.instrument`); on anything but the toy world
their answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.embedded.instrument import ATTRIBUTES, Instrument

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGED_SIZE = 64


def judged_pixels(images: Sequence[Image]) -> Tensor:
    """Pictures of any size -> (n, 3, 64, 64) in [-1, 1], from the centre square.

    Raises:
        ValueError: there is no picture.
    """
    if not images:
        raise ValueError("no pictures to judge")
    squares = []
    for image in images:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        if side != JUDGED_SIZE:
            square = square.resize((JUDGED_SIZE, JUDGED_SIZE), resample=4)  # PIL's BOX: the mean
        squares.append(np.asarray(square, np.float32))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def judge_prompt(
    instrument: Instrument, images: Sequence[Image], wanted: Sequence[dict[str, str]]
) -> dict[str, float]:
    """How often pictures show the attributes that were asked for.

    Args:
        instrument: the judges.
        images: n pictures.
        wanted: n mappings from attribute ("kind", "color", "pattern", "background") to its value;
            what a mapping leaves out is not judged.

    Returns:
        The accuracy of each attribute that was asked for, and under "all" the share of pictures
        that are right in everything.

    Raises:
        ValueError: the lengths differ, or a value is none that the classifier knows.
    """
    if len(images) != len(wanted):
        raise ValueError(f"{len(images)} pictures but {len(wanted)} wishes")
    logits = instrument.classifier(judged_pixels(images))
    right: dict[str, list[bool]] = {name: [] for name in [*ATTRIBUTES, "all"]}
    for number, wish in enumerate(wanted):
        answers = []
        for name, value in wish.items():
            if value not in ATTRIBUTES.get(name, ()):
                raise ValueError(f"the classifier knows no {name} {value!r}")
            answers.append(int(logits[name][number].argmax()) == ATTRIBUTES[name].index(value))
            right[name].append(answers[-1])
        right["all"].append(all(answers))
    return {name: float(np.mean(answers)) for name, answers in right.items() if answers}


@torch.no_grad()
def subject_similarity(
    instrument: Instrument, images: Sequence[Image], references: Sequence[Image]
) -> float:
    """Mean cosine of every picture to every reference in the subject embedder.

    The scale: two real pictures of one subject and of two subjects score what the instrument's
    ``measured`` says under "same_subject" and "other_subject".
    """
    vectors = instrument.embedder(judged_pixels(images))
    truth = instrument.embedder(judged_pixels(references))
    return float((vectors @ truth.T).mean())
