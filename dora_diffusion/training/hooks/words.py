"""Training of new words (textual inversion) during the first steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dora_diffusion.training.hooks.hook import Hook

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class NewWords(Hook):
    """Trains new words for ``train_text_encoder_ti_frac`` of the steps.

    Args:
        step: Step of a run with new words.
    """

    def __init__(self, step: Step) -> None:
        self._words, self._last_step = step.weights.words, step.config.word_steps

    def begin(self, number: int) -> None:
        self._words.train(number <= self._last_step)

    def gradients(self, number: int) -> None:
        for vectors in self._words.parameters().values():
            if number > self._last_step:
                # With a gradient of 0, momentum (of Prodigy, for example) still moves a parameter.
                vectors.grad = None
            elif vectors.grad is None:  # No caption of the batch contained a new word.
                vectors.grad = torch.zeros_like(vectors)
