"""One optimizer step of several runs at once, on one model: an adapter for each.

All rows of all runs go through text encoders and UNet together, each with its run's adapter
(`adapters.scope.stack_scope`). What else a step is made of each run does for itself: it draws its
rows, its loss is the mean of its own, and it clips and updates by its own settings. A row depends
on no other, so that each run's gradient is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dora_diffusion.adapters.inject import DEFAULT_NAME
from dora_diffusion.adapters.layers import AdaptedLayer, LayerAdapter
from dora_diffusion.adapters.rows import StackedRows
from dora_diffusion.adapters.scope import stack_of, stack_scope
from dora_diffusion.models.text import Conditioning
from dora_diffusion.numerics.loss import add_noise
from dora_diffusion.training.inputs import StepInputs
from dora_diffusion.training.objective import HeldPrior, Objective
from dora_diffusion.training.session import Session

Given = Mapping[int, StepInputs]
"""The inputs of runs by their number."""


class PackedStep:
    """Does steps of several sessions, whose optimizers are AdamW.

    Args:
        sessions: What trains; all on one model and one accelerator.
        layers: The adapted layers of that model.
        adapters: Of each session the adapters of these layers.

    Raises:
        ValueError: If the adapters cannot be trained together.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        layers: Sequence[AdaptedLayer],
        adapters: Sequence[Sequence[LayerAdapter]],
    ) -> None:
        self.sessions, self.layers = sessions, layers
        self._flats = [session.train_step.flat for session in sessions]
        vectors = [flat.vector() for flat in self._flats if flat is not None]
        self.stack = stack_of(layers, list(zip(*adapters, strict=True)), vectors)

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
            assert flat is not None
            try:
                flat.give_gradients(gradients[k], self.stack.unused(k))
                outcomes[k] = session.train_step.update(steps[k], losses[k])
            except Exception as error:
                outcomes[k] = error
        return outcomes

    def _draw(self, turn: int, outcomes: list[dict[str, Any] | Exception]) -> dict[int, StepInputs]:
        """The next batch of each session that has one in this turn of accumulation."""
        given = {}
        for k, session in enumerate(self.sessions):
            is_done = turn >= session.config.gradient_accumulation_steps
            if is_done or isinstance(outcomes[k], Exception):
                continue
            try:
                given[k] = session.train_step.next_inputs()
            except Exception as error:
                outcomes[k] = error
        return given

    def _backward(
        self, group: Given, rows: StackedRows, shares: Sequence[float]
    ) -> dict[int, Tensor]:
        """Losses and gradients of batches: ``(total, prior)`` of each session, detached."""
        accelerator, objective = self.sessions[0].accelerator, self._objective(next(iter(group)))
        with accelerator.autocast():
            merged = StepInputs.cat(list(group.values()))
            alpha_bar = objective.alphas_cumprod[merged.timesteps]
            noisy = add_noise(merged.latents, merged.noise, alpha_bar)
            counts = [len(inputs.captions) for inputs in group.values()]
            each = dict(zip(group, noisy.split(counts), strict=True))
            of_class = {k: held for k, i in group.items() if (held := i.of_class()) is not None}
            held_inputs = {k: inputs for k, (inputs, _) in of_class.items()}
            held_noisy = [each[k][chosen] for k, (_, chosen) in of_class.items()]
            owners = [*_owners(group), *_owners(held_inputs)]
            every = [*group.values(), *held_inputs.values()]
            with rows.of(owners):
                model_pred = self._predict(
                    torch.cat([noisy, *held_noisy]), every, (*group, *held_inputs)
                )
                targets: Sequence[Tensor] = ()
                if held_inputs:
                    with torch.no_grad(), rows.of(()):
                        target = self._predict(
                            torch.cat(held_noisy), list(held_inputs.values()), tuple(held_inputs)
                        )
                    targets = target.split([len(i.captions) for i in held_inputs.values()])
                parts = iter(model_pred.split([len(inputs.captions) for inputs in every]))
                own = {k: next(parts) for k in group}
                held = {
                    k: HeldPrior(of_class[k][1], next(parts), target)
                    for k, target in zip(held_inputs, targets, strict=True)
                }
                alphas = dict(zip(group, alpha_bar.split(counts), strict=True))
                made, totals = {}, []
                for k, inputs in group.items():
                    step = self.sessions[k].train_step
                    subject, prior = self._objective(k).losses(
                        inputs, alphas[k], own[k], held.get(k)
                    )
                    total = step.total(subject, prior)
                    totals.append(total * shares[k])
                    made[k] = torch.stack([total.detach(), prior.detach()])
                accelerator.backward(torch.stack(totals).sum())
        return made

    def _objective(self, k: int) -> Objective:
        return cast(Objective, self.sessions[k].train_step.objective)

    def _predict(
        self, noisy_latents: Tensor, inputs: Sequence[StepInputs], numbers: Sequence[int]
    ) -> Tensor:
        """The predictions for several sessions' inputs, by their numbers."""
        objective = self._objective(numbers[0])
        if objective.condition.trains:
            conditioning = objective.condition([c for own in inputs for c in own.captions])
        else:
            # What each has cached.
            pairs = zip(numbers, inputs, strict=True)
            conditioning = Conditioning.cat(
                [self._objective(k).condition(own.captions) for k, own in pairs]
            )
        return objective.predict(noisy_latents, StepInputs.cat(inputs), conditioning)


def adapters_on(layers: Iterable[AdaptedLayer]) -> list[LayerAdapter]:
    """The adapter that a session has put on each layer."""
    return [cast(LayerAdapter, layer.adapters[DEFAULT_NAME]) for layer in layers]


def _owners(given: Given) -> list[int]:
    """The session of each row."""
    return [k for k, inputs in given.items() for _ in inputs.captions]


def _of_one_size(given: Given) -> Iterator[dict[int, StepInputs]]:
    """Batches that can be computed together: their latents have one size."""
    groups: dict[tuple[int, ...], dict[int, StepInputs]] = {}
    for k, inputs in given.items():
        groups.setdefault(tuple(inputs.latents.shape[1:]), {})[k] = inputs
    yield from groups.values()
