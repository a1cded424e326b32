"""One optimizer step: losses, gradients, clipping, update."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.scope import NormCache, norm_scope
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.training.accelerator import shards_model
from dora_diffusion.training.allocation import RankAllocation, build_allocation
from dora_diffusion.training.full import FullWeights, TrainedWeights
from dora_diffusion.training.inputs import InputSource, StepInputs
from dora_diffusion.training.metrics import require_finite
from dora_diffusion.training.objective import Objective
from dora_diffusion.training.optimizer import (
    build_lr_schedule,
    build_optimizer,
    learning_rates,
    restore_optimizer,
)
from dora_diffusion.training.parameters import FlatParameters, SteppedParameters
from dora_diffusion.training.sharding import LocalParameters, average_gradients, shard
from dora_diffusion.training.words import TrainedWords


@dataclass
class TrainingStep:
    """Does optimizer steps.

    Attributes:
        config: Seed, accumulation, weight of the prior and limit of the gradients' norm.
        accelerator: What `make_accelerator` made.
        modules: The components that train, by name.
        objective: `StepInputs` to the losses of subject and prior.
        parameters: What the optimizer sees of the parameters that train.
        optimizer: Over these.
        lr_schedule: Its learning rates.
        inputs: Gives each batch's, by its number since the start of the run.
        words: New words that train.
        is_sharded: Whether processes share one model (`sharding.shard`).
        allocation: Moves ranks between layers; None: they stay.
        norm_cache: Spares each step a wait for the device, and what the step before found out.
        batches: Number of batches since the start of the run.
        is_whole: Whether all that a checkpoint holds is of one step: False while the optimizer
            moves it.
    """

    config: TrainConfig
    accelerator: Any
    modules: Mapping[str, nn.Module]
    objective: nn.Module
    parameters: SteppedParameters
    optimizer: Any
    lr_schedule: Any
    inputs: InputSource
    words: TrainedWords
    is_sharded: bool = False
    allocation: RankAllocation | None = None
    norm_cache: NormCache = field(default_factory=NormCache)
    batches: int = 0
    is_whole: bool = True

    def __call__(self, step: int) -> dict[str, Any]:
        """Do step number ``step``, from 1. Returns its numbers, still on the device.

        Raises:
            TrainingError: On a CPU, if loss or gradients are not finite, before anything has moved.
                On a GPU, which is not waited for, the optimizer stays where it is, and whoever
                reads the record tells.
        """
        # Only dropout draws from the global generator. Reseeding it makes resuming exact.
        process = self.accelerator.process_index
        self.words.train(step <= self.config.word_steps)
        torch.manual_seed(generator_for("step", self.config.seed, step, process).initial_seed())
        accumulation = self.config.gradient_accumulation_steps
        losses = []
        # No parameter changes inside: every norm is computed once for all that happens here.
        with norm_scope(*self.modules.values(), cache=self.norm_cache):
            for i in range(accumulation):
                last = i == accumulation - 1
                with nullcontext() if last else self.accelerator.no_sync(self.objective):
                    losses.append(self._backward(1 / accumulation))
        if step > self.config.word_steps:
            # A gradient of 0 is a step by the momentum to some, as Prodigy; none is none to all.
            for rows in self.words.parameters().values():
                rows.grad = None
        if self.allocation is not None and "d" not in self.optimizer.param_groups[0]:
            self.allocation.add_orthogonality(self._loss_scale())
        self.parameters.take_gradients()
        if self.allocation is not None:
            self.parameters.share_gradients()
        if self.is_sharded:
            average_gradients(self.parameters.whole)
        return self.update(step, losses)

    def update(self, step: int, losses: list[Tensor]) -> dict[str, Any]:
        """Clip the gradients that are there, and take the optimizer's step.

        Args:
            step: Its number, from 1.
            losses: ``(total, prior)`` of each batch, detached.

        Returns:
            The step's numbers, as those of a call.

        Raises:
            TrainingError: As a call does.
        """
        rates = learning_rates(self.optimizer.param_groups)
        effective_rates = rates.get("effective_lr")
        scale = self._loss_scale() if self.allocation is not None else 1.0
        norm = self.parameters.clip(self.config.max_grad_norm, self.accelerator)
        means = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean")
        record = {"step": step, "loss": means[0], "grad_norm": norm, **rates}
        self._hold_back(record)
        self.is_whole = False
        self.optimizer.step()
        # Where fp16 overflowed there was no step, which Accelerate does not know of a fused one.
        if self.allocation is not None and self._loss_scale() >= scale:
            if effective_rates is not None:
                self.allocation.make_orthogonal(max(effective_rates.values()))
            self.allocation.after_step(step)
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters.finish()
        self.is_whole = True
        return record | ({"prior_loss": means[1]} if self.config.holds_prior else {})

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, whole in the first process where the model is sharded."""
        return dict(self.parameters.gather_state(self.optimizer.state_dict()))

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Put moments and the schedule's place of a checkpoint back (`restore_optimizer`)."""
        own = {**state, "optimizer": self.parameters.own_state(state["optimizer"])}
        restore_optimizer(self.optimizer, self.lr_schedule, own)

    def _backward(self, share: float) -> Tensor:
        """Loss and gradients of the next batch: ``(total, prior)``, detached."""
        inputs = self.next_inputs()
        with self.accelerator.autocast():
            subject_loss, prior_loss = self.objective(inputs)
        loss = self.total(subject_loss, prior_loss)
        self.accelerator.backward(loss * share)
        return torch.stack([loss.detach(), prior_loss.detach()])

    def next_inputs(self) -> StepInputs:
        """What the next batch is computed from."""
        inputs = self.inputs(self.batches)
        self.batches += 1
        return inputs

    def total(self, subject_loss: Tensor, prior_loss: Tensor) -> Tensor:
        """The loss that is minimised."""
        return subject_loss + self.config.prior_loss_weight * prior_loss

    def _loss_scale(self) -> float:
        """What losses are multiplied by for fp16; an overflow lowers it."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _hold_back(self, record: Mapping[str, Any]) -> None:
        """See that no step is taken where loss or gradients are not finite.

        With fp16, where that is usual, the scaler does. A fused optimizer of CUDA does nothing, as
        it would for a scaler; others on a GPU get zeros, so that no NaN comes in.
        """
        norm, optimizer = record["grad_norm"], self.optimizer.optimizer
        if self.accelerator.scaler is not None:
            return
        if norm.device.type == "cpu":
            require_finite(record)
            return
        is_wrong = (norm + record["loss"]).isfinite().logical_not()
        if norm.device.type == "cuda" and optimizer.defaults.get("fused"):
            optimizer.found_inf = is_wrong.float()
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_wrong, 0)


def build_step(
    config: TrainConfig,
    accelerator: Any,
    components: Components,
    weights: TrainedWeights,
    inputs: InputSource,
) -> TrainingStep:
    """Make objective, optimizer and schedule for what trains."""
    shards = shards_model(accelerator)
    if shards:  # Before it comes to the device, which need not have room for all of it.
        trained, base = (
            (weights.trained, weights.base) if isinstance(weights, FullWeights) else ({}, {})
        )
        shard(components, weights.modules, trained, base, accelerator)
    objective: Any = Objective(
        components,
        train_text_encoder=config.train_text_encoder,
        snr_gamma=config.snr_gamma or 0.0,
        debiased=config.debiased_estimation_loss,
        base_weights=weights.base_weights,
        words=list(weights.words.parameters().values()),
    ).to(accelerator.device)
    # Before the parameters share their memory: DistributedDataParallel gives them other memory.
    if accelerator.num_processes > 1 and not shards:
        with warnings.catch_warnings():
            # Newer names of torch's are not known to Accelerate.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            objective = accelerator.prepare_model(objective)
    groups = weights.groups(config)
    parameters = SteppedParameters(groups)
    # AdamW treats every number alike, whatever parameter it belongs to. Adafactor knows rows and
    # columns, Prodigy each parameter's start, and the 8-bit one quantises no small ones, which
    # keeps the magnitudes' moments whole. A model's own weights are few and large.
    if not config.is_full and config.optimizer_name == "adamw":
        parameters = FlatParameters(groups)
    elif shards and config.is_full:
        parameters = LocalParameters(groups)
    optimizer = build_optimizer(parameters.groups, config)
    # Before Accelerate takes the optimizer's `step`, which the schedule marks as its own.
    schedule = build_lr_schedule(optimizer, config)
    optimizer = accelerator.prepare_optimizer(optimizer)
    allocation = None
    if config.parametrization == "adalora" and not config.is_full:
        allocation = build_allocation(weights.modules, config)
    return TrainingStep(
        config, accelerator, weights.modules, objective, parameters, optimizer, schedule, inputs,
        weights.words, shards, allocation,
    )  # fmt: skip
