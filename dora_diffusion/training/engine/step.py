"""One optimizer step of the runs that train on one model: an adapter for each, mostly one.

All rows of all runs go through text encoders and UNet together, each with its run's adapter
(`adapters.stack`). What else a step is made of each run does for itself (`Learner`): it draws its
rows, its loss is the mean of its own, and it clips and updates by its own settings. A row depends
on no other, so that each run's gradient is what it would be alone. A run by itself is a pack of
one; one that trains the model's own weights has no adapters at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.inject import AdapterSet, layer_adapters
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.stack import BASE, AdapterStack, Masks
from dora_diffusion.config import TrainConfig
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.models.components import Components
from dora_diffusion.models.offload import send
from dora_diffusion.numerics.loss import huber_delta
from dora_diffusion.numerics.operation import timestep_ranks
from dora_diffusion.training.engine.accelerator import (
    average_gradients,
    shard,
    shards_model,
)
from dora_diffusion.training.engine.averaging import Average, build_average
from dora_diffusion.training.engine.objective import (
    Conditioner,
    InputSource,
    NoisyBatch,
    Objective,
    StepInputs,
    losses_of,
    noisy_batches,
)
from dora_diffusion.training.engine.optimizer import (
    SteppedParameters,
    build_lr_schedule,
    build_optimizer,
    learning_rates,
    restore_optimizer,
    stepped_parameters,
)
from dora_diffusion.training.engine.preconditioning import Preconditioner
from dora_diffusion.training.results.metrics import require_finite
from dora_diffusion.training.trainable.allocation import RankAllocation, build_allocation
from dora_diffusion.training.trainable.full import FullWeights, TrainedWeights
from dora_diffusion.training.trainable.words import TrainedTokens

Batches = Sequence[tuple[int, NoisyBatch]]
"""Noisy batches, each with the place of its run."""
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
        self, learners: Sequence[Learner], adapters: Sequence[AdapterSet] | None = None
    ) -> None:
        self.learners = learners
        if adapters is None:
            adapters = [AdapterSet.of(*learners[0].modules.values())]
        layers = [layer for layer, _, _ in adapters[0].layers]
        each = zip(*(own.trained() for own in adapters), strict=True)
        self.stack = AdapterStack(layers, list(each))
        of_unet = set(map(id, learners[0].objective.components.unet.modules()))
        self._has_rows = [id(layer) in of_unet for layer in layers]
        configs = [learner.config for learner in learners]
        self._has_masks = any(config.rank_dropout or config.least_rank for config in configs)

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

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters of the stack."""
        return (p for own in self.stack.adapters for a in own for p in a.parameters())

    def accumulate(self, batches: Sequence[StepInputs]) -> None:
        """Leave the gradients of batches with their parameters, of the only run; nothing moves."""
        self.learners[0].begin(1)
        with self.stack.scope():
            for inputs in batches:
                for _ in self._backward({0: inputs}, is_masked=False):
                    pass

    def _draw(self, turn: int, outcomes: list[Outcome]) -> dict[int, StepInputs]:
        """The next batch of each run that has one in this turn of accumulation."""
        given = {}
        for k, learner in enumerate(self.learners):
            if turn < _turns(learner) and not isinstance(outcomes[k], Exception):
                try:
                    given[k] = learner.inputs(learner.batches)
                    learner.batches += 1
                except Exception as error:
                    outcomes[k] = error
        return given

    def _backward(
        self, group: Mapping[int, StepInputs], *, is_masked: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """Losses and gradients of batches of one size: ``(total, prior)`` of each, detached."""
        accelerator, chosen = self.learners[0].accelerator, [self.learners[k] for k in group]
        own, held = noisy_batches([learner.objective for learner in chosen], list(group.values()))
        pairs = [*zip(group, own, strict=True), *zip(group, held, strict=True)]
        rows = [k for k, batch in pairs if batch is not None for _ in batch.inputs.captions]
        totals = []
        masked = [(k, batch) for k, batch in pairs if batch is not None and is_masked]
        # Backward inside, since blocks may be recomputed.
        with self.stack.of(rows, *self._masks(masked)):
            with accelerator.autocast():
                losses = losses_of(own, held, partial(self.stack.of, BASE))
                for learner, (subject, prior) in zip(chosen, losses, strict=True):
                    totals.append(subject + learner.config.prior_loss_weight * prior)
            shares = [t * (1 / _turns(own)) for own, t in zip(chosen, totals, strict=True)]
            accelerator.backward(torch.stack(shares).sum())
        for k, total, (_, prior) in zip(group, totals, losses, strict=True):
            yield k, torch.stack([total.detach(), prior.detach()])

    def _masks(self, batches: Batches) -> tuple[Masks, Masks]:
        """Masks of each layer for batches of some runs, and the ranks that T-LoRA leaves active.

        As `AdapterStack.of` takes both. A text encoder has one mask for all rows of a batch, since
        a caption may be several of its rows, and no timestep: all its ranks are active.
        """
        if not self._has_masks:
            return (), ()
        configs = [self.learners[k].config for k, _ in batches]
        drops, limits = (
            any(getattr(c, n) for c in configs) for n in ("rank_dropout", "least_rank")
        )
        if not (drops or limits):
            return (), ()
        ranks = [[adapter.down.shape[0] for adapter in own] for own in self.stack.adapters]
        if not limits:
            return self._kept(batches, ranks), [None] * len(ranks)
        active = self._active(batches, ranks)
        if not drops:
            return active, active
        both = zip(self._kept(batches, ranks), active, strict=True)
        return [mask if own is None else mask * own for mask, own in both], active

    def _kept(self, batches: Batches, ranks: Sequence[Sequence[int]]) -> list[Tensor]:
        """Rank dropout of each layer, by seed and batch: no other run draws from it."""
        made: list[list[Tensor]] = [[] for _ in ranks]
        first: dict[int, Tensor] = {}
        for k, batch in batches:
            learner, own = self.learners[k], [each[k] for each in ranks]
            place = learner.config.seed, learner.batches, learner.accelerator.process_index
            generator = generator_for("ranks", *place, "held" if k in first else "")
            drawn = torch.rand(len(batch.inputs.captions), sum(own), generator=generator)
            p = learner.config.rank_dropout
            kept = send((drawn >= p) / (1 - p), batch.latents.device)
            shared = first.setdefault(k, kept[:1]).expand_as(kept)
            parts = zip(kept.split(own, 1), shared.split(own, 1), self._has_rows, strict=True)
            for layer, (by_row, alike, has_rows) in enumerate(parts):
                mask = by_row if has_rows else alike
                made[layer].append(F.pad(mask, (0, max(ranks[layer]) - own[layer])))
        is_one = len(first) == 1
        return [
            masks[0][:1] if is_one and not has_rows else torch.cat(masks)
            for masks, has_rows in zip(made, self._has_rows, strict=True)
        ]

    def _active(self, batches: Batches, ranks: Sequence[Sequence[int]]) -> Masks:
        """1 where a row's timestep leaves a rank active, else 0; None for a layer without masks."""
        least = [self.learners[k].config.least_rank or inf for k, _ in batches]
        made = dict[tuple[int, int], Tensor]()
        active = list[Tensor | None]()
        for own, has_rows in zip(ranks, self._has_rows, strict=True):
            if not has_rows or all(own[k] <= m for (k, _), m in zip(batches, least, strict=True)):
                active.append(None)
                continue
            for number, (k, batch) in enumerate(batches):
                if (number, own[k]) not in made:
                    made[number, own[k]] = self._active_ranks(k, batch, own[k])
            parts = (made[number, own[k]] for number, (k, _) in enumerate(batches))
            active.append(torch.cat([F.pad(p, (0, max(own) - p.shape[1])) for p in parts]))
        return active

    def _active_ranks(self, k: int, batch: NoisyBatch, rank: int) -> Tensor:
        """1 where a row's timestep leaves a rank of a layer of ``rank`` active: ``(B, rank)``."""
        learner, timesteps = self.learners[k], batch.inputs.timesteps
        steps = learner.objective.components.scheduler.config.num_train_timesteps
        least = min(learner.config.least_rank or rank, rank)
        limits = timestep_ranks(timesteps, steps, rank, least)
        return (torch.arange(rank, device=limits.device) < limits[:, None]).float()


def _turns(learner: Learner) -> int:
    return learner.config.gradient_accumulation_steps


def _of_one_size(given: Mapping[int, StepInputs]) -> Iterator[dict[int, StepInputs]]:
    """Batches that can be computed together: their latents have one size."""
    groups: dict[tuple[int, ...], dict[int, StepInputs]] = {}
    for k, inputs in given.items():
        groups.setdefault(tuple(inputs.latents.shape[1:]), {})[k] = inputs
    yield from groups.values()


@dataclass
class Learner:
    """Training of a run, step by step.

    Attributes:
        config: Seed, accumulation, weight of the prior and limit of the gradients' norm.
        accelerator: What `make_accelerator` made.
        modules: The components that train, by name.
        objective: What its loss is made of.
        parameters: What the optimizer sees of the parameters that train.
        optimizer: Over these.
        lr_schedule: Its learning rates.
        inputs: Gives each batch's, by its number since the start of the run.
        words: New words that train.
        allocation: Moves ranks between layers; None: they stay.
        preconditioner: Changes the gradients of A and B, once they are clipped.
        average: The weights that are used; None: those that train.
        adapters: Those whose update's norm is limited; none: it is not.
        batches: Number of batches since the start of the run.
        is_whole: Whether all that a checkpoint holds is of one step: False while the optimizer
            moves it.
    """

    config: TrainConfig
    accelerator: Any
    modules: Mapping[str, nn.Module]
    objective: Objective
    parameters: SteppedParameters
    optimizer: Any
    lr_schedule: Any
    inputs: InputSource
    words: TrainedTokens
    allocation: RankAllocation | None = None
    preconditioner: Preconditioner | None = None
    average: Average | None = None
    adapters: Sequence[LayerAdapter] = ()
    batches: int = 0
    is_whole: bool = True

    def begin(self, step: int) -> None:
        """Begin the batches of a step, counted from 1."""
        # Only dropout draws from the global generator. Reseeding it makes resuming exact.
        process = self.accelerator.process_index
        self.words.train(step <= self.config.word_steps)
        torch.manual_seed(generator_for("step", self.config.seed, step, process).initial_seed())

    def update(self, step: int, losses: list[Tensor]) -> dict[str, Any]:
        """Clip the gradients that are there, and take the optimizer's step.

        Args:
            step: Its number, from 1.
            losses: ``(total, prior)`` of each batch, detached.

        Returns:
            The step's numbers, still on the device.

        Raises:
            TrainingError: On a CPU, if loss or gradients are not finite, before anything has moved.
                On a GPU, which is not waited for, the optimizer stays where it is, and whoever
                reads the record tells.
        """
        if step > self.config.word_steps:
            # A gradient of 0 is a step by the momentum to some, as Prodigy; none is none to all.
            for rows in self.words.parameters().values():
                rows.grad = None
        if self.allocation is not None and "d" not in self.optimizer.param_groups[0]:
            self.allocation.add_orthogonality(self._loss_scale())
        self.parameters.take_gradients()
        if self.allocation is not None or self.preconditioner is not None:
            self.parameters.share_gradients()
        if self.accelerator.num_processes > 1:
            average_gradients(self.parameters.whole)
        rates = learning_rates(self.optimizer.param_groups)
        effective_rates = rates.get("effective_lr")
        scale = self._loss_scale() if self.allocation is not None else 1.0
        norm = self.parameters.clip(self.config.max_grad_norm, self.accelerator)
        means = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean")
        record = {"step": step, "loss": means[0], "grad_norm": norm, **rates}
        self._hold_back(record)
        if self.preconditioner is not None:
            self.preconditioner()
        self.is_whole = False
        self.optimizer.step()
        # Where fp16 overflowed there was no step; Accelerate does not tell so of a fused optimizer.
        if self.allocation is not None and self._loss_scale() >= scale:
            if effective_rates is not None:
                self.allocation.make_orthogonal(max(effective_rates.values()))
            self.allocation.after_step(step)
        if self.adapters and self.config.scale_weight_norms is not None:
            limit_norms(self.adapters, self.config.scale_weight_norms)
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters.finish()
        if self.average is not None:
            self.average.update(step)
        self.is_whole = True
        return record | ({"prior_loss": means[1]} if self.config.holds_prior else {})

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, whole in the first process where the model is sharded."""
        return dict(self.parameters.gather_state(self.optimizer.state_dict()))

    def restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Restore moments and the schedule's place from a checkpoint (`restore_optimizer`)."""
        own = {**state, "optimizer": self.parameters.own_state(state["optimizer"])}
        restore_optimizer(self.optimizer, self.lr_schedule, own)

    def _loss_scale(self) -> float:
        """Return the loss scale of fp16; an overflow lowers it."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _hold_back(self, record: Mapping[str, Any]) -> None:
        """Skip the optimizer step when loss or gradients are not finite.

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


def build_learner(
    config: TrainConfig,
    accelerator: Any,
    components: Components,
    weights: TrainedWeights,
    inputs: InputSource,
) -> Learner:
    """Make objective, optimizer and schedule for what trains."""
    shards = shards_model(accelerator)
    if shards:  # Before it comes to the device, which need not have room for all of it.
        trained, base = (
            (weights.trained, weights.base) if isinstance(weights, FullWeights) else ({}, {})
        )
        shard(components, weights.modules, trained, base, accelerator)
    delta = None
    if config.loss_type == "huber":
        steps = components.scheduler.config.num_train_timesteps
        delta = partial(
            huber_delta,
            schedule=config.huber_schedule,
            c=config.huber_c,
            num_train_timesteps=steps,
        )
    objective = Objective(
        components,
        Conditioner(components, config.train_text_encoder),
        components.scheduler.alphas_cumprod.to(components.device),
        weights.base_weights,
        config.weightings,
        config.unmasked_prior,
        delta,
        list(weights.words.parameters().values()),
        config.slider_guidance,
    )
    parameters = stepped_parameters(weights.groups(config), config, shards=shards)
    optimizer = build_optimizer(parameters.groups, config)
    # Before Accelerate takes the optimizer's `step`, which the schedule marks as its own.
    schedule = build_lr_schedule(optimizer, config)
    optimizer = accelerator.prepare_optimizer(optimizer)
    allocation, preconditioner = None, None
    if config.parametrization == "adalora" and not config.is_full:
        allocation = build_allocation(weights.modules, config)
    adapters = [each for model in weights.modules.values() for each in layer_adapters(model)]
    if config.preconditions:
        preconditioner = Preconditioner(adapters, config.precondition_damping)
    average = build_average(parameters, optimizer, config)
    return Learner(
        config, accelerator, weights.modules, objective, parameters, optimizer, schedule, inputs,
        weights.words, allocation, preconditioner, average, adapters if config.limits_norms else (),
    )  # fmt: skip


@torch.no_grad()
def limit_norms(adapters: Sequence[LayerAdapter], limit: float) -> None:
    """Scale updates ``s B A`` down to a Frobenius norm, half in A and half in B.

    Equal to sd-scripts' ``scale_weight_norms``, from products of A and of B with themselves.

    Args:
        adapters: Those whose A and B are ``down`` and ``up``.
        limit: The largest norm.
    """
    squares = []
    for adapter in adapters:
        down, up = adapter.down.flatten(1), adapter.up.flatten(1)
        product = (up.mT @ up) * (down @ down.mT)
        squares.append(product.sum() * (adapter.alpha / len(down)) ** 2)
    norms = torch.stack(squares).clamp_min(0).sqrt()
    shares = (limit / norms.clamp_min(limit)).sqrt().unbind()
    for part in ("down", "up"):
        torch._foreach_mul_([getattr(adapter, part) for adapter in adapters], list(shares))
