"""Fixed tensors of a step's graph, and the key of batches that can share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.adapters.stack import RankRoute
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.offload import send
from dora_diffusion.training.conditioner import Reading
from dora_diffusion.training.prediction import Drawn, Question, encodings


class Inputs(NamedTuple):
    """Batch of a step, with everything that its graph reads.

    Attributes:
        drawn: The batch and its questions.
        route: Rank masks of the batch.
        parts: Tensors of the batch, its captions and its masks, nested.
        tensors: The same tensors in a list.
        key: Shapes and dtypes of the tensors, and everything else that decides on operations.
    """

    drawn: Drawn
    route: RankRoute
    parts: tuple[Any, ...]
    tensors: list[Tensor]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, drawn: Drawn, route: RankRoute, state: object) -> Inputs:
        """Read the captions of a batch, and collect its tensors.

        Args:
            drawn: The batch.
            route: Its rank masks.
            state: State of the model that decides on operations.
        """
        batch, questions, tensors = drawn.batch, drawn.distinct(), list[Tensor]()
        calls = [*encodings(drawn.of_base()), *encodings(drawn.trained())]
        readings = [encode.read(captions) for encode, captions in calls]
        tensors_of_batch = batch.inputs, batch.latents, batch.noise, batch.mask, batch.weights
        parts = *tensors_of_batch, readings, route.masks

        def signature(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            tensors.append(tensor)
            return tensor.shape, tensor.dtype

        key = (
            state,
            _with_tensors(parts, signature),
            tuple(tuple(map(questions.index, term)) for term in drawn.questions),
            tuple((q.ask.rows, q.ask.of_base, len(q.ask.captions)) for q in questions),
            (batch.photos, *batch.class_captions),
            tuple(batch.masked_rows),
        )
        return cls(drawn, route, parts, tensors, key)

    def fixed(self) -> tuple[Drawn, RankRoute, FixedEncoder, list[Tensor]]:
        """Copy the batch to tensors that stay. Returns also the encoder of its captions."""
        batch, term = self.drawn.batch, self.drawn.questions[0]
        tensors = [send(tensor, batch.latents.device).clone() for tensor in self.tensors]
        copies = iter(tensors)
        inputs, latents, noise, mask, weights, readings, masks = _with_tensors(
            self.parts, lambda _: next(copies)
        )
        encoder: Any = FixedEncoder(term[0].encode, readings)
        batch = replace(
            batch, inputs=inputs, latents=latents, noise=noise, mask=mask, weights=weights,
            generators=(), _indices={},
        )  # fmt: skip
        questions = [
            [Question(question.ask, batch, encoder) for question in term]
            for term in self.drawn.questions
        ]
        return Drawn(batch, questions), RankRoute(masks, self.route.active), encoder, tensors


def _with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a nested value with changed tensors, and tuples in place of lists."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{n: _with_tensors(getattr(value, n), change) for n in names})
    if not isinstance(value, list | tuple):
        return value
    children = [_with_tensors(child, change) for child in value]
    return type(value)(*children) if hasattr(value, "_fields") else tuple(children)


class FixedEncoder:
    """Encoder of a graph's captions, which is called once for each forward pass, in their order.

    Args:
        encode: Encoder of the run.
        readings: Captions of each call.
    """

    def __init__(self, encode: Any, readings: Sequence[Reading]) -> None:
        self.trains = encode.trains
        self._encode, self._readings = encode.encode, readings

    def start(self) -> None:
        """Begin a step."""
        self._left = iter(self._readings)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        encoded: Conditioning = self._encode(next(self._left))
        return encoded
