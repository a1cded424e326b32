"""Predictions of a step: one forward pass of the trained model and one of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.models.components import Components
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.training.batch import Batch, ModelInputs, Rows
from dora_diffusion.training.conditioner import Conditioner

Base = Callable[[], AbstractContextManager[object]]
"""Returns a context in which the model is the base model, without training."""


class Ask(NamedTuple):
    """Request of a loss term for predictions on a batch.

    Attributes:
        captions: Prompt of each row.
        rows: Rows of the batch.
        of_base: Whether the base model predicts, without gradients.
    """

    captions: tuple[str, ...]
    rows: Rows = None
    of_base: bool = False

    @classmethod
    def by_row(cls, batch: Batch, captions: Mapping[int, str], *, of_base: bool = False) -> Ask:
        """Request predictions for some rows of a batch from captions by row."""
        return cls(tuple(captions.values()), batch.rows(captions), of_base)


class Question(NamedTuple):
    """Request together with its batch. Equal questions are predicted once.

    Attributes:
        ask: Rows and captions.
        batch: The batch.
        encode: Caption encoder.
    """

    ask: Ask
    batch: Batch
    encode: Conditioner


class Drawn(NamedTuple):
    """Batch with the questions of each loss term."""

    batch: Batch
    questions: Sequence[Sequence[Question]]

    def distinct(self) -> list[Question]:
        """Return each question once."""
        return list(dict.fromkeys(chain.from_iterable(self.questions)))

    def trained(self) -> list[Question]:
        """Return the questions to the trained model, in the order of their rows."""
        return [question for question in self.distinct() if not question.ask.of_base]

    def of_base(self) -> list[Question]:
        """Return the questions to the base model."""
        return [question for question in self.distinct() if question.ask.of_base]


def answer(
    components: Components, questions: Sequence[Question], base: Base
) -> dict[Question, Tensor]:
    """Predict the answers ``(rows, C, h, w)`` to questions on batches of the same size.

    Args:
        components: The model, with the adapters of the rows active.
        questions: Questions, in the order of the rows of a forward pass.
        base: Returns a context in which the model is the base model.
    """
    answers: dict[Question, Tensor] = {}
    if of_base := [question for question in questions if question.ask.of_base]:
        with torch.no_grad(), base():
            answers |= _pass(components, of_base)
    return answers | _pass(
        components, [question for question in questions if not question.ask.of_base]
    )


def _pass(components: Components, questions: Sequence[Question]) -> dict[Question, Tensor]:
    inputs = ModelInputs.cat([q.batch.inputs_of(q.ask.rows) for q in questions])
    conditioning = _conditioning(questions)
    predicted = components.predict(
        inputs.noisy_latents,
        inputs.timesteps,
        conditioning,
        inputs.time_ids,
        inputs.condition,
    )
    sizes = [len(question.ask.captions) for question in questions]
    return dict(zip(questions, predicted.split(sizes), strict=True))


def _conditioning(questions: Sequence[Question]) -> Conditioning:
    if questions[0].encode.trains:  # All captions in one pass of the text encoders.
        captions = [caption for question in questions for caption in question.ask.captions]
        return questions[0].encode(captions)
    return Conditioning.cat([question.encode(question.ask.captions) for question in questions])
