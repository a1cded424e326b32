"""Sampling of the base and the adapted model for the same images at the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.evaluation.measures import ImageRequest
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.generate import SamplingSettings, generate_images

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[int, int], None]
"""Callback with (steps done, steps in all)."""

T = TypeVar("T")


def sample(
    components: Components,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    batch_size: int,
    on_step: OnStep | None,
) -> list[Image]:
    """One image per request, with whatever adapters are on the model."""
    return generate_images(
        components,
        [request.prompt for request in requests],
        [request.seed for request in requests],
        settings,
        batch_size=batch_size,
        on_step=on_step,
    )


def base_and_adapted(
    components: Components,
    ask: Callable[[OnStep | None], T],
    seeds: Sequence[int],
    on_step: OnStep | None,
    base_model: Components | None = None,
) -> dict[str, T]:
    """Return the model's answers without its adapters (``"base"``) and with them (``"adapted"``).

    Args:
        components: The model with its adapters on, or one that was trained whole.
        ask: Asks the model as it is, and reports its steps.
        seeds: One round of prompts each.
        on_step: Called with the steps of both halves.
        base_model: What a model that was trained whole was trained from.

    Raises:
        ValueError: There is no seed, or the base is a model of another shape.
    """
    if not seeds:
        raise ValueError("no seeds to evaluate with")

    def half(number: int) -> OnStep | None:
        if on_step is None:
            return None
        return lambda step, total: on_step(number * total + step, 2 * total)

    base_weights = (
        components.weights_of(base_model)
        if base_model
        else disabled(*components.adaptable().values())
    )
    with base_weights:
        base = ask(half(0))
    return {"base": base, "adapted": ask(half(1))}


def first_round(
    requests: Sequence[ImageRequest],
    images: Mapping[str, Sequence[Image]],
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """The ``images`` and ``labels`` of an `Evaluation`: the first round, without hidden groups."""
    rows = [row for row, r in enumerate(requests) if r.round == 0 and r.group not in hidden]
    return {
        "images": {name: [made[row] for row in rows] for name, made in images.items()},
        "labels": [requests[row].prompt.removeprefix("a photo of ") for row in rows],
    }
