"""Subjects of the training images, and the rare words that are names.

A model that has met names keeps a rare word apart from the class word beside it, which is what
personalization with prior preservation lives on: in published models too, a strange word stands
for something. Two kinds of names are taught. A *design* is a look, and an object called ``qzj``
always has it, whatever its class. A *newcomer* is called by a word that stands for a different
stranger each time, so that such a word says "somebody in particular" and no more; ``sks`` is one.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from dora_diffusion.toy.judges import sample_subject
from dora_diffusion.toy.shapes import CLASSES
from dora_diffusion.toy.world import DrawnSubject
from lab.pretrain.strangers import sample_stranger

DESIGN_COUNT = 40
_WORDS, _DESIGNS = 5, 16  # seeds
_DESIGN, _NEWCOMER, _STRANGER = 0.15, 0.1, 0.15  # shares of the images


@functools.cache
def rare_words(count: int = 60) -> tuple[str, ...]:
    """Words that no language has, like ``sks``, which is the first of them."""
    generator = np.random.default_rng(_WORDS)
    letters = list("bcdfghjklmnpqrstvwxz")
    words = [
        "".join(generator.choice(letters, int(generator.integers(3, 5)))) for _ in range(count)
    ]
    return ("sks", *words[: count - 1])


@functools.cache
def designs() -> dict[str, DrawnSubject]:
    """The looks that rare words name. Their class is to be replaced."""
    generator = np.random.default_rng(_DESIGNS)
    names = rare_words()[1 : 1 + DESIGN_COUNT]
    return {name: sample_stranger(generator, "mug") for name in names}


@functools.cache
def newcomers() -> tuple[str, ...]:
    """The rare words that stand for a different stranger each time."""
    return tuple(word for word in rare_words() if word not in designs())


def sample_named(generator: np.random.Generator) -> tuple[DrawnSubject, str]:
    """Draw an object that has a class word, and its name; ``""`` if it has none."""
    draw = generator.random()
    if draw < _DESIGN:
        name = str(generator.choice(list(designs())))
        return replace(designs()[name], kind=str(generator.choice(list(CLASSES)))), name
    if draw < _DESIGN + _NEWCOMER:
        return sample_stranger(generator), str(generator.choice(newcomers()))
    if draw < _DESIGN + _NEWCOMER + _STRANGER:
        return sample_stranger(generator), ""
    return sample_subject(generator), ""
