"""One optimizer step of the runs that train on one model: an adapter for each, mostly one.

All rows of all runs go through text encoders and UNet together, each with its run's adapter
(`adapters.stack`). What else a step is made of each run does for itself
(`training.engine.learner.Learner`): it draws its rows, its loss is the mean of its own, and it
clips and updates by its own settings. A row depends on no other, so that each run's gradient is
what it would be alone. A run by itself is a pack of one; one that trains the model's own weights
has no adapters at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.adapters.inject import DetachedAdapters
from dora_diffusion.adapters.stack import BASE, AdapterStack
from dora_diffusion.training.engine.learner import Learner
from dora_diffusion.training.engine.objective import losses_of, noisy_batches
from dora_diffusion.training.inputs.draws import StepInputs

Outcome = dict[str, Any] | Exception
"""The record of a run's step, or what went wrong in it alone: then nothing of it was changed."""


class TrainingEngine:
    """Engine for the steps of several runs.

    Args:
        learners: What trains; all on one model and one accelerator.
        adapters: Of each run those on the layers, which are the same ones; None: what is on the
            model is the only run's.

    Raises:
        ValueError: If the adapters cannot be trained together.
    """

    def __init__(
        self, learners: Sequence[Learner], adapters: Sequence[DetachedAdapters] | None = None
    ) -> None:
        self.learners = learners
        if adapters is None:
            adapters = [DetachedAdapters.of(*learners[0].modules.values())]
        layers = [layer for layer, _, _ in adapters[0].layers]
        each = zip(*(own.of_name() for own in adapters), strict=True)
        self.stack = AdapterStack(layers, list(each))

    def __call__(self, steps: Sequence[int]) -> list[Outcome]:
        """Run a step of each run.

        Args:
            steps: The number of each run's step, from 1.
        """
        outcomes: list[Outcome] = [{} for _ in self.learners]
        losses: list[list[Tensor]] = [[] for _ in self.learners]
        for learner, step in zip(self.learners, steps, strict=True):
            learner.begin(step)
        # No parameter changes inside: every norm is computed once for all that happens here.
        with self.stack.scope():
            for turn in range(max(map(_turns, self.learners))):
                for group in _of_one_size(self._draw(turn, outcomes)):
                    for k, loss in self._backward(group):
                        losses[k].append(loss)
        for k, (learner, step) in enumerate(zip(self.learners, steps, strict=True)):
            if not isinstance(outcomes[k], Exception):
                try:
                    outcomes[k] = learner.update(step, losses[k])
                except Exception as error:
                    outcomes[k] = error
        return outcomes

    def _draw(self, turn: int, outcomes: list[Outcome]) -> dict[int, StepInputs]:
        """The next batch of each run that has one in this turn of accumulation."""
        given = {}
        for k, learner in enumerate(self.learners):
            if turn < _turns(learner) and not isinstance(outcomes[k], Exception):
                try:
                    given[k] = learner.next_inputs()
                except Exception as error:
                    outcomes[k] = error
        return given

    def _backward(self, group: Mapping[int, StepInputs]) -> Iterator[tuple[int, Tensor]]:
        """Losses and gradients of batches of one size: ``(total, prior)`` of each, detached."""
        accelerator, chosen = self.learners[0].accelerator, [self.learners[k] for k in group]
        own, held = noisy_batches([learner.objective for learner in chosen], list(group.values()))
        pairs = [*zip(group, own, strict=True), *zip(group, held, strict=True)]
        rows = [k for k, batch in pairs if batch is not None for _ in batch.inputs.captions]
        totals = []
        # Backward inside, since blocks may be recomputed.
        with self.stack.of(rows):
            with accelerator.autocast():
                losses = losses_of(own, held, partial(self.stack.of, BASE))
                for learner, (subject, prior) in zip(chosen, losses, strict=True):
                    totals.append(learner.total(subject, prior))
            shares = [t * (1 / _turns(own)) for own, t in zip(chosen, totals, strict=True)]
            accelerator.backward(torch.stack(shares).sum())
        for k, total, (_, prior) in zip(group, totals, losses, strict=True):
            yield k, torch.stack([total.detach(), prior.detach()])


def _turns(learner: Learner) -> int:
    return learner.config.gradient_accumulation_steps


def _of_one_size(given: Mapping[int, StepInputs]) -> Iterator[dict[int, StepInputs]]:
    """Batches that can be computed together: their latents have one size."""
    groups: dict[tuple[int, ...], dict[int, StepInputs]] = {}
    for k, inputs in given.items():
        groups.setdefault(tuple(inputs.latents.shape[1:]), {})[k] = inputs
    yield from groups.values()
