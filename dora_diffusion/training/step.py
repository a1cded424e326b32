"""Optimizer step of a run: batches, predictions, losses, gradients and update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.adapters.stack import BASE, AdapterStack
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.training.batch import Batch, Batches
from dora_diffusion.training.conditioner import Conditioner
from dora_diffusion.training.metrics import skip_if_not_finite
from dora_diffusion.training.optimizer import SteppedParameters, learning_rates
from dora_diffusion.training.prediction import Drawn, Question, answer
from dora_diffusion.training.processes import average_gradients
from dora_diffusion.training.terms import Term, mean_losses

if TYPE_CHECKING:
    from dora_diffusion.training.hook import Hook, Record
    from dora_diffusion.training.trainable.weights import TrainedWeights


@dataclass
class Step:
    """Optimizer step of a run.

    Attributes:
        config: Settings.
        accelerator: Devices and processes (`make_accelerator`).
        components: The model.
        weights: Trained weights.
        adapters: Trained adapters.
        batches: Batches of the run.
        encode: Caption encoder.
        terms: Terms of the loss.
        parameters: Parameters of the optimizer.
        optimizer: The optimizer.
        lr_schedule: Learning-rate schedule.
        hooks: Optional features, in the order in which they are called.
    """

    config: TrainConfig
    accelerator: Any
    components: Components
    weights: TrainedWeights
    adapters: AdapterSet
    batches: Batches
    encode: Conditioner
    terms: Sequence[Term]
    parameters: SteppedParameters
    optimizer: Any
    lr_schedule: Any
    hooks: Sequence[Hook] = ()

    is_whole = True  # False while an update is incomplete, so that no checkpoint can be saved.

    def __call__(self, number: int) -> Record:
        """Take a step, counted from 1. Returns its metrics, still on the device.

        Raises:
            TrainingError: If loss or gradients are not finite, on a CPU. No weight has changed.
        """
        self.begin(number)
        return self.update(number, self.accumulate(number))

    def begin(self, number: int) -> None:
        """Seed the global generator for a step.

        Only dropout uses it. Seeding it at each step makes resuming exact.
        """
        position = self.config.seed, number, self.accelerator.process_index
        torch.manual_seed(generator_for("step", *position).initial_seed())

    def draw(self, number: int) -> list[Batch]:
        """Draw the batches of a step."""
        batches = [next(self.batches) for _ in range(self.turns)]
        for hook in self.hooks:
            hook.drawn(number, batches)
        return batches

    def questions(self, batch: Batch) -> Drawn:
        """Return a batch with the predictions that the terms request."""
        encode = self.encode
        asks = [term.asks(batch) for term in self.terms]
        return Drawn(batch, [[Question(ask, batch, encode) for ask in of_term] for of_term in asks])

    def accumulate(self, number: int) -> list[Tensor]:
        """Accumulate the gradients of a step's batches. Returns ``(loss, prior)`` of each."""
        batches = self.draw(number)
        with self.stack.scope():  # Norms are computed once: no parameter changes inside.
            return [self.backward(self.questions(batch)) for batch in batches]

    def backward(self, drawn: Drawn) -> Tensor:
        """Accumulate the gradients of a batch. Returns ``(loss, prior)``, detached."""
        # Backward stays inside the context: gradient checkpointing recomputes blocks.
        with self.stack.of(0):
            with self.accelerator.autocast():
                base = partial(self.base, self.stack)
                answers = answer(self.components, drawn.distinct(), base)
                loss, prior = self.losses(drawn, answers)
            self.accelerator.backward(loss * (1 / self.turns))
        return torch.stack([loss.detach(), prior.detach()])

    def update(self, number: int, losses: list[Tensor]) -> Record:
        """Clip the gradients and update the parameters. Returns the metrics of the step."""
        for hook in self.hooks:
            hook.gradients(number)
        self.parameters.take_gradients()
        average_gradients(self.parameters.whole, self.accelerator)
        rates = learning_rates(self.optimizer.param_groups)
        norm = self.parameters.clip(self.config.max_grad_norm, self.accelerator)
        loss, prior = self.accelerator.reduce(
            torch.stack(list(losses)).mean(dim=0), reduction="mean"
        )
        record = {"step": number, "loss": loss, "grad_norm": norm, **rates}
        if self.accelerator.scaler is None:  # The scaler of fp16 skips steps itself.
            skip_if_not_finite(record, self.parameters, self.optimizer.optimizer)
        for hook in self.hooks:
            hook.clipped(record)
        self.is_whole = False
        self.optimizer.step()
        for hook in self.hooks:
            hook.moved(number)
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters.finish()
        for hook in self.hooks:
            hook.done(number)
        self.is_whole = True
        return record | ({"prior_loss": prior} if self.has_prior else {})

    def losses(self, drawn: Drawn, answers: Mapping[Question, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the total loss of a batch and its prior-preservation loss."""
        batch = drawn.batch
        losses = [
            term.losses(batch, *(answers[question] for question in questions))
            for term, questions in zip(self.terms, drawn.questions, strict=True)
            if questions
        ]
        subject, prior = mean_losses(batch, losses)
        return subject + self.config.prior_loss_weight * prior, prior

    @contextmanager
    def base(self, stack: AdapterStack) -> Iterator[None]:
        """Restore the base model inside the block, with the stack of all trained adapters."""
        with stack.of(BASE), self.weights.base_weights(keep=True):
            yield

    @cached_property
    def has_prior(self) -> bool:
        """True if the loss of any subject has a prior-preservation loss."""
        return self.config.uses("prior_loss_weight")

    @cached_property
    def turns(self) -> int:
        """Number of batches per step."""
        return self.config.gradient_accumulation_steps

    @cached_property
    def stack(self) -> AdapterStack:
        """Stack of the trained adapters, which are prepared together."""
        return stack_of(self.adapters, memory=self.parameters.memory)


def stack_of(*adapters: AdapterSet, memory: Mapping[Tensor, Tensor] | None = None) -> AdapterStack:
    """Stack the adapters of several runs on the same layers.

    Args:
        adapters: The adapters of each run.
        memory: See `AdapterStack`.

    Raises:
        ValueError: If the adapters cannot be trained together.
    """
    layers = [layer for layer, _, _ in adapters[0].layers]
    return AdapterStack(
        layers, list(zip(*(run.trained() for run in adapters), strict=True)), memory
    )
