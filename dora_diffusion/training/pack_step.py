"""Optimizer step of several runs on one model.

Text encoders and UNet process the rows of all runs in one pass, each row with the adapter of its
run (`adapters.stack`). Each run does everything else by itself (`step.Step`). Rows do not depend on
each other, so that the gradients of a run are the same as without the other runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.training.batch import Batch
from dora_diffusion.training.hook import Record
from dora_diffusion.training.prediction import Drawn, answer
from dora_diffusion.training.step import Step, stack_of

Outcome = Record | Exception
"""Metrics of a run's step, or the error that kept this run from taking the step."""
Group = Mapping[int, Drawn]
"""Batches by index of their run."""


class PackStep:
    """Optimizer step of several runs.

    Args:
        steps: Steps of the runs, on one model.

    Raises:
        ValueError: If the adapters cannot be trained together.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.stack = stack_of(*(step.adapters for step in steps))

    def __call__(self, numbers: Sequence[int]) -> list[Outcome]:
        """Take a step of each run.

        Args:
            numbers: Step number of each run, counted from 1.
        """
        outcomes: list[Outcome] = [{} for _ in self.steps]
        losses: list[list[Tensor]] = [[] for _ in self.steps]
        batches: list[list[Batch]] = [[] for _ in self.steps]
        for k, (step, number) in enumerate(zip(self.steps, numbers, strict=True)):
            try:
                step.begin(number)
                batches[k] = step.draw(number)
            except Exception as error:
                outcomes[k] = error
        with self.stack.scope():  # Norms are computed once: no parameter changes inside.
            for turn in range(max(step.turns for step in self.steps)):
                for group in _of_one_size(self._questions(turn, batches, outcomes)):
                    for k, loss in self._backward(group):
                        losses[k].append(loss)
        for k, (step, number) in enumerate(zip(self.steps, numbers, strict=True)):
            if not isinstance(outcomes[k], Exception):
                try:
                    outcomes[k] = step.update(number, losses[k])
                except Exception as error:
                    outcomes[k] = error
        return outcomes

    def _questions(
        self, turn: int, batches: Sequence[Sequence[Batch]], outcomes: list[Outcome]
    ) -> Group:
        """Return a batch of each run that has not yet accumulated all its gradients."""
        group = {}
        for k, step in enumerate(self.steps):
            if turn < len(batches[k]) and not isinstance(outcomes[k], Exception):
                try:
                    group[k] = step.questions(batches[k][turn])
                except Exception as error:
                    outcomes[k] = error
        return group

    def _backward(self, group: Group) -> Iterator[tuple[int, Tensor]]:
        """Accumulate the gradients of batches. Yields each run with ``(loss, prior)``, detached."""
        first = self.steps[0]
        trained = _interleaved([
            [(k, question) for question in drawn.trained()] for k, drawn in group.items()
        ])  # fmt: skip
        of_base = _interleaved([drawn.of_base() for drawn in group.values()])
        rows = [k for k, question in trained for _ in question.ask.captions]
        questions = [question for _, question in trained] + of_base
        # Backward stays inside the context: gradient checkpointing recomputes blocks.
        with self.stack.of(rows):
            with first.accelerator.autocast():
                base = partial(first.base, self.stack)
                answers = answer(first.components, questions, base)
                losses = {k: self.steps[k].losses(drawn, answers) for k, drawn in group.items()}
            shares = [loss * (1 / self.steps[k].turns) for k, (loss, _) in losses.items()]
            first.accelerator.backward(torch.stack(shares).sum())
        for k, pair in losses.items():
            yield k, torch.stack([loss.detach() for loss in pair])


def _interleaved(sequences: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the first element of each sequence, then the second of each, and so on."""
    missing = object()
    columns = zip_longest(*sequences, fillvalue=missing)
    return [item for item in chain.from_iterable(columns) if item is not missing]


def _of_one_size(group: Group) -> Iterator[Group]:
    """Group batches by the size of their latents."""
    groups: dict[tuple[int, ...], dict[int, Drawn]] = {}
    for k, drawn in group.items():
        groups.setdefault(tuple(drawn.batch.latents.shape[1:]), {})[k] = drawn
    yield from groups.values()
