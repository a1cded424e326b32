"""One optimizer step of a run: batches, predictions, losses, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.adapters.stack import BASE, AdapterStack
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.training.batch import Batches
from dora_diffusion.training.conditioner import Conditioner
from dora_diffusion.training.hooks.hook import Hook, RankRoute, Record
from dora_diffusion.training.metrics import skip_if_not_finite
from dora_diffusion.training.optimizer import SteppedParameters, learning_rates
from dora_diffusion.training.prediction import Drawn, Question, answer
from dora_diffusion.training.processes import average_gradients
from dora_diffusion.training.terms import Term, mean_losses

if TYPE_CHECKING:
    from dora_diffusion.training.trainable.full import TrainedWeights


@dataclass
class Step:
    """Optimizer step of a run.

    Attributes:
        config: Settings.
        accelerator: Devices and processes (`make_accelerator`).
        components: The model.
        weights: The weights that train.
        adapters: The adapters among them.
        batches: Batches of the run.
        encode: Encoder of captions.
        terms: Terms of the loss.
        parameters: The parameters as the optimizer sees them.
        optimizer: The optimizer.
        lr_schedule: Its learning rates.
        hooks: Features of the run, in the order in which they act.
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

    is_whole = True  # False while the optimizer moves what a checkpoint would hold.

    def __call__(self, number: int) -> Record:
        """Take a step, counted from 1. Returns its numbers, still on the device.

        Raises:
            TrainingError: On a CPU, if loss or gradients are not finite. Nothing has moved then.
        """
        self.begin(number)
        with self.stack.scope():  # Norms are computed once: no parameter changes inside.
            losses = [self.backward(self.draw()) for _ in range(self.turns)]
        return self.update(number, losses)

    def begin(self, number: int) -> None:
        """Prepare a step."""
        for hook in self.hooks:
            hook.begin(number)
        # Only dropout draws from the global generator. Reseeding it makes resuming exact.
        position = self.config.seed, number, self.accelerator.process_index
        torch.manual_seed(generator_for("step", *position).initial_seed())

    def draw(self) -> Drawn:
        """Draw the next batch, and what the terms ask about it."""
        batch, encode = next(self.batches), self.encode
        asks = [term.asks(batch) for term in self.terms]
        return Drawn(batch, [[Question(ask, batch, encode) for ask in part] for part in asks])

    def backward(self, drawn: Drawn) -> Tensor:
        """Add a batch's gradients to those of the step. Returns ``(loss, prior)``, detached."""
        # Backward inside, since blocks may be recomputed.
        with self.stack.of(0, *self.route(drawn)):
            with self.accelerator.autocast():
                answers = answer(self.components.unet, drawn.distinct(), self.base)
                loss, prior = self.losses(drawn, answers)
            self.accelerator.backward(loss * (1 / self.turns))
        return torch.stack([loss.detach(), prior.detach()])

    def update(self, number: int, losses: list[Tensor]) -> Record:
        """Clip the gradients, and take the optimizer's step. Returns the step's numbers."""
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
        return record | ({"prior_loss": prior} if self.config.holds_prior else {})

    def route(self, drawn: Drawn) -> RankRoute:
        """Return the masks of adapters' ranks for a batch."""
        route = RankRoute()
        for hook in self.hooks:
            route = hook.route(drawn, route)
        return route

    def losses(self, drawn: Drawn, answers: Mapping[Question, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch, and the part of it that preserves the prior."""
        batch = drawn.batch
        losses = [
            term.losses(batch, *(answers[question] for question in questions))
            for term, questions in zip(self.terms, drawn.questions, strict=True)
        ]
        subject, prior = mean_losses(batch, losses)
        return subject + self.config.prior_loss_weight * prior, prior

    @contextmanager
    def base(self) -> Iterator[None]:
        """Make the model what it was before training, inside the block."""
        with self.stack.of(BASE), self.weights.base_weights():
            yield

    @cached_property
    def turns(self) -> int:
        """Number of batches of a step."""
        return self.config.gradient_accumulation_steps

    @cached_property
    def stack(self) -> AdapterStack:
        """The adapters, prepared for each step together."""
        return stack_of(self.adapters)


def stack_of(*adapters: AdapterSet) -> AdapterStack:
    """Stack the adapters of runs, which are on the same layers.

    Raises:
        ValueError: If they cannot be trained together.
    """
    layers = [layer for layer, _, _ in adapters[0].layers]
    return AdapterStack(layers, list(zip(*(run.trained() for run in adapters), strict=True)))
