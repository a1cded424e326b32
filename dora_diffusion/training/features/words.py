"""Training of new words (textual inversion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class WordsCode(FeatureCode):
    """New words in a run."""

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [NewWords(step)]


class NewWords(Hook):
    """Gives new words a gradient in every step.

    Args:
        step: Step of a run with new words.
    """

    def __init__(self, step: Step) -> None:
        self._words = step.weights.words

    def gradients(self, number: int) -> None:
        for vectors in self._words.parameters().values():
            if vectors.grad is None:  # No caption of the batch contained a new word.
                vectors.grad = torch.zeros_like(vectors)
