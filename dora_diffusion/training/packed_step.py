"""One optimizer step of several runs at once, on one model: an adapter for each.

All rows of all runs go through text encoders and UNet together, each with its run's adapter
(`adapters.scope.stack_scope`). What else a step is made of each run does for itself: it draws its
rows, its loss is the mean of its own, and it clips and updates by its own settings. A row depends
on no other, so that each run's gradient is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dora_diffusion.adapters.inject import DetachedAdapters
from dora_diffusion.adapters.rows import StackedRows
from dora_diffusion.adapters.scope import stack_of, stack_scope
from dora_diffusion.models.text import Conditioning
from dora_diffusion.numerics.loss import add_noise
from dora_diffusion.training.inputs import StepInputs
from dora_diffusion.training.objective import HeldPrior, Objective
from dora_diffusion.training.parameters import FlatParameters
from dora_diffusion.training.session import Session


class _Batch(NamedTuple):
    """Rows of one session, by its number, whose latents are noisy already."""

    number: int
    inputs: StepInputs
    noisy: Tensor
    chosen: slice | Tensor = slice(None)

    def of_class(self) -> _Batch | None:
        """The rows whose image-free prior is held, with class captions."""
        if (found := self.inputs.of_class()) is None:
            return None
        inputs, chosen = found
        return _Batch(self.number, inputs, self.noisy[chosen], chosen)


class PackedStep:
    """Does steps of several sessions, whose optimizers are AdamW.

    Args:
        sessions: What trains; all on one model and one accelerator.
        adapters: Of each session those on the layers, which are the same ones; the first's are on
            the model.

    Raises:
        ValueError: If the adapters cannot be trained together.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        adapters: Sequence[DetachedAdapters],
    ) -> None:
        self.sessions = sessions
        self.layers = [layer for layer, _, _ in adapters[0].layers]
        self._flats = [cast(FlatParameters, s.train_step.parameters) for s in sessions]
        vectors = [flat.vector() for flat in self._flats]
        each = zip(*(own.of_name() for own in adapters), strict=True)
        self.stack = stack_of(self.layers, list(each), vectors)

    def __call__(self, steps: Sequence[int]) -> list[dict[str, Any] | Exception]:
        """Do a step of each session.

        Args:
            steps: The number of each session's step, from 1.

        Returns:
            The record of each, or what went wrong in it alone: then nothing of it was changed.
        """
        outcomes: list[dict[str, Any] | Exception] = [{} for _ in self.sessions]
        losses: list[list[Tensor]] = [[] for _ in self.sessions]
        shares = [1 / s.config.gradient_accumulation_steps for s in self.sessions]
        with stack_scope(self.layers, self.stack) as rows:
            for turn in range(max(s.config.gradient_accumulation_steps for s in self.sessions)):
                given = self._draw(turn, outcomes)
                for group in _of_one_size(given):
                    for k, loss in self._backward(group, rows, shares).items():
                        losses[k].append(loss)
        gradients = self.stack.gradients()
        for k, (session, flat) in enumerate(zip(self.sessions, self._flats, strict=True)):
            if isinstance(outcomes[k], Exception):
                continue
            try:
                flat.give_gradients(gradients[k], self.stack.unused(k))
                outcomes[k] = session.train_step.update(steps[k], losses[k])
            except Exception as error:
                outcomes[k] = error
        return outcomes

    def _draw(self, turn: int, outcomes: list[dict[str, Any] | Exception]) -> dict[int, StepInputs]:
        """The next batch of each session that has one in this turn of accumulation."""
        given = {}
        for k in self.stack.layout.order:  # Rows in the order of the stack need no gather.
            session = self.sessions[k]
            is_done = turn >= session.config.gradient_accumulation_steps
            if is_done or isinstance(outcomes[k], Exception):
                continue
            try:
                given[k] = session.train_step.next_inputs()
            except Exception as error:
                outcomes[k] = error
        return given

    def _backward(
        self, group: Mapping[int, StepInputs], rows: StackedRows, shares: Sequence[float]
    ) -> dict[int, Tensor]:
        """Losses and gradients of batches of one size: ``(total, prior)`` of each, detached."""
        accelerator, objective = self.sessions[0].accelerator, self._objective(next(iter(group)))
        losses, totals = {}, []
        with accelerator.autocast():
            merged = StepInputs.cat(list(group.values()))
            alpha_bar = objective.alphas_cumprod[merged.timesteps]
            counts = [len(inputs.captions) for inputs in group.values()]
            alphas = alpha_bar.split(counts)
            noisy = add_noise(merged.latents, merged.noise, alpha_bar).split(counts)
            own = [_Batch(k, group[k], part) for k, part in zip(group, noisy, strict=True)]
            held = [batch for each in own if (batch := each.of_class()) is not None]
            with rows.of([batch.number for batch in (*own, *held) for _ in batch.inputs.captions]):
                predictions = iter(self._predict([*own, *held]))
                own_predictions = [next(predictions) for _ in own]
                priors = dict(self._priors(held, predictions, rows))
                for batch, alpha, made in zip(own, alphas, own_predictions, strict=True):
                    k = batch.number
                    subject, prior = self._objective(k).losses(
                        batch.inputs, alpha, made, priors.get(k)
                    )
                    total = self.sessions[k].train_step.total(subject, prior)
                    losses[k] = torch.stack([total.detach(), prior.detach()])
                    totals.append(total * shares[k])
                # Inside, since blocks may be recomputed.
                accelerator.backward(torch.stack(totals).sum())
        return losses

    def _priors(
        self, held: Sequence[_Batch], predictions: Iterator[Tensor], rows: StackedRows
    ) -> Iterator[tuple[int, HeldPrior]]:
        """The image-free priors of sessions that have one, by number."""
        if not held:
            return
        with torch.no_grad(), rows.of(()):
            targets = self._predict(held)
        for batch, target in zip(held, targets, strict=True):
            yield batch.number, HeldPrior(batch.chosen, next(predictions), target)

    def _predict(self, batches: Sequence[_Batch]) -> Sequence[Tensor]:
        """The predictions of batches, in one."""
        objective = self._objective(batches[0].number)
        every = [batch.inputs for batch in batches]
        if objective.condition.trains:
            conditioning = objective.condition([c for inputs in every for c in inputs.captions])
        else:
            # What each has cached.
            each = (self._objective(b.number).condition(b.inputs.captions) for b in batches)
            conditioning = Conditioning.cat(list(each))
        noisy_latents = torch.cat([batch.noisy for batch in batches])
        made = objective.predict(noisy_latents, StepInputs.cat(every), conditioning)
        return made.split([len(inputs.captions) for inputs in every])

    def _objective(self, k: int) -> Objective:
        return cast(Objective, self.sessions[k].train_step.objective)


def _of_one_size(given: Mapping[int, StepInputs]) -> Iterator[dict[int, StepInputs]]:
    """Batches that can be computed together: their latents have one size."""
    groups: dict[tuple[int, ...], dict[int, StepInputs]] = {}
    for k, inputs in given.items():
        groups.setdefault(tuple(inputs.latents.shape[1:]), {})[k] = inputs
    yield from groups.values()
