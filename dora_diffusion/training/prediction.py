"""Predictions of a step: one pass of the model for all questions, and one of its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.models.latents import predict
from dora_diffusion.models.text import Conditioning
from dora_diffusion.training.batch import Batch, ModelInputs, Rows
from dora_diffusion.training.conditioner import Conditioner

Base = Callable[[], AbstractContextManager[object]]
"""Returns a context in which the model is its base: as it was before training."""


class Ask(NamedTuple):
    """Predictions that a term of the loss needs for a batch.

    Attributes:
        captions: The prompt of each row.
        rows: The rows.
        of_base: Predictions of the base model, without gradients.
    """

    captions: tuple[str, ...]
    rows: Rows = None
    of_base: bool = False

    @classmethod
    def by_row(cls, batch: Batch, captions: Mapping[int, str], *, of_base: bool = False) -> Ask:
        """Ask for some rows of a batch, each with its caption."""
        return cls(tuple(captions.values()), batch.rows(captions), of_base)


class Question(NamedTuple):
    """Question about a batch. Equal questions are answered once.

    Attributes:
        ask: Rows and captions.
        batch: The batch.
        encode: Encoder of captions.
    """

    ask: Ask
    batch: Batch
    encode: Conditioner


class Drawn(NamedTuple):
    """A batch, and the questions of each term of the loss about it."""

    batch: Batch
    questions: Sequence[Sequence[Question]]

    def distinct(self) -> list[Question]:
        """Return each question once."""
        return list(dict.fromkeys(chain.from_iterable(self.questions)))

    def trained(self) -> list[Question]:
        """Return the questions about the model that trains, in the order of their rows."""
        return [question for question in self.distinct() if not question.ask.of_base]

    def of_base(self) -> list[Question]:
        """Return the questions about the base model."""
        return [question for question in self.distinct() if question.ask.of_base]


def answer(unet: Any, questions: Sequence[Question], base: Base) -> dict[Question, Tensor]:
    """Predict the answers ``(rows, C, h, w)`` to questions about batches of one size.

    Args:
        unet: The model, with the adapters of the rows.
        questions: Questions, in the order of the rows of a pass.
        base: Makes the model its base.
    """
    answers: dict[Question, Tensor] = {}
    if of_base := [question for question in questions if question.ask.of_base]:
        with torch.no_grad(), base():
            answers |= _pass(unet, of_base)
    return answers | _pass(unet, [question for question in questions if not question.ask.of_base])


def _pass(unet: Any, questions: Sequence[Question]) -> dict[Question, Tensor]:
    inputs = ModelInputs.cat([q.batch.inputs_of(q.ask.rows) for q in questions])
    conditioning = _conditioning(questions)
    predicted = predict(
        unet,
        inputs.noisy_latents,
        inputs.timesteps,
        conditioning,
        inputs.time_ids,
        inputs.condition,
    )
    sizes = [len(question.ask.captions) for question in questions]
    return dict(zip(questions, predicted.split(sizes), strict=True))


def _conditioning(questions: Sequence[Question]) -> Conditioning:
    encode = questions[0].encode
    if encode.trains:  # All captions in one pass of the text encoders.
        return encode([caption for question in questions for caption in question.ask.captions])
    return Conditioning.cat([question.encode(question.ask.captions) for question in questions])
