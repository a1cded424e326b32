"""AdaLoRA: rank allocation between layers by importance, and its orthogonality term.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv:2303.10512. ``delta = s P diag(l) Q``: a triplet is an entry of l with its column of P and its
row of Q. Unimportant triplets are pruned (l is set to 0) until a budget is reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.parametrizations import SingularParametrization
from dora_diffusion.config.features.adalora import phases_of
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook, Record

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


# Decay of the moving averages of sensitivity and uncertainty (section 3.2), as in PEFT.
BETA_1 = BETA_2 = 0.85


@dataclass(frozen=True)
class BudgetSchedule:
    """Budget of triplets over all layers, by step (section 3.3).

    Attributes:
        start: Number of triplets at the start.
        target: Number of triplets at the end.
        steps: Number of optimizer steps of the run.
        warmup: Number of first steps with all triplets.
        final: Number of last steps with a fixed selection.
        interval: Number of steps between selections in the phase between.

    Raises:
        ValueError: If no steps are left between the first and the last phase.
    """

    start: int
    target: int
    steps: int
    warmup: int
    final: int
    interval: int

    def __post_init__(self) -> None:
        if self.warmup + self.final >= self.steps:
            raise ValueError(
                f"a warm-up of {self.warmup} and a final phase of {self.final} steps leave none "
                f"of {self.steps} steps for rank allocation; shorten them"
            )

    @property
    def last(self) -> int:
        """Step of the final selection."""
        return self.steps - self.final

    def budget(self, step: int) -> int:
        """Return the number of triplets after a step, counted from 1. The decrease is cubic."""
        if step <= self.warmup:
            return self.start
        if step >= self.last:
            return self.target
        left = 1 - (step - self.warmup) / (self.last - self.warmup)
        return int((self.start - self.target) * left**3 + self.target)

    def chooses(self, step: int) -> bool:
        """Return whether triplets are selected again after a step."""
        if step >= self.last:
            return step == self.last
        return step > self.warmup and step % self.interval == 0


@dataclass
class Sensitivity:
    """Smoothed importance of all entries of some tensors (section 3.2).

    Attributes:
        mean: Moving average of ``|w dL/dw|``, for each tensor.
        uncertainty: Moving average of the deviation from the mean.
    """

    mean: list[Tensor]
    uncertainty: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Sensitivity:
        """Return the sensitivity before any step."""
        return cls(*([torch.zeros_like(t.detach()) for t in tensors] for _ in range(2)))

    @torch.no_grad()
    def update(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Update the moving averages with a step."""
        now = [product.abs_() for product in torch._foreach_mul(list(values), list(gradients))]
        torch._foreach_lerp_(self.mean, now, 1 - BETA_1)
        distance = [d.abs_() for d in torch._foreach_sub(now, self.mean)]
        torch._foreach_lerp_(self.uncertainty, distance, 1 - BETA_2)

    def scores(self) -> list[Tensor]:
        """Return the importance of all entries."""
        return list(torch._foreach_mul(self.mean, self.uncertainty))


def triplet_importance(diagonal: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the importance of the triplets of a layer, ``(r,)`` (section 3.2).

    Args:
        diagonal: Importance of the entries of l, ``(r,)``.
        down: Importance of the entries of Q, ``(r, in, *k)``.
        up: Importance of the entries of P, ``(out, r, ...)``.
    """
    return diagonal + down.flatten(1).mean(dim=1) + up.flatten(1).mean(dim=0)


def kept_triplets(importance: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return masks ``(r,)`` of the ``budget`` most important triplets over all layers.

    Triplets with the same importance as the most important pruned one are pruned, too.
    """
    scores_of_all = torch.cat(list(importance))
    dropped = len(scores_of_all) - budget
    if dropped <= 0:
        return [torch.ones_like(scores, dtype=torch.bool) for scores in importance]
    threshold = scores_of_all.kthvalue(dropped).values
    return [scores > threshold for scores in importance]


@torch.no_grad()
def orthogonality_gradients(factors: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Return the gradient of the orthogonality term for each factor.

    The term is ``weight`` times the mean of ``|Q Q^T - I|`` and ``|P^T P - I|`` over all factors,
    in the Frobenius norm, as in PEFT (section 3.1 uses the squares).

    Args:
        factors: Matrices ``(r, n)`` whose rows should be orthonormal: Q and the transpose of P.
        weight: Weight of the term.
    """
    gradients = []
    for rows in factors:
        distance = rows @ rows.t()
        distance.diagonal().sub_(1)
        share = 2 * weight / len(factors) / distance.norm().clamp_min(1e-30)
        gradients.append(share * (distance @ rows))
    return gradients


class AdaLoraCode(FeatureCode):
    """AdaLoRA in a run."""

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [Allocation(step)]


class Allocation(Hook):
    """Reallocates ranks between layers.

    Args:
        step: Step of a run with AdaLoRA.
    """

    name = "allocation"

    def __init__(self, step: Step) -> None:
        config, adapters = step.config, step.adapters.trained()
        start = sum(len(adapter.down) for adapter in adapters)
        target_rank = config.target_rank or max(1, round(2 * config.rank / 3))
        target = round(start * target_rank / config.rank)
        phases, steps = phases_of(config), config.max_train_steps or 0
        schedule = BudgetSchedule(start, target, steps, *phases, config.allocation_interval)
        self.ranks = RankAllocation(adapters, schedule, config.orthogonality_weight)
        self._parameters, self._scaler = step.parameters, step.accelerator.scaler
        # Prodigy estimates its step size from gradients. The term would distort the estimate.
        self._is_decoupled = "d" in step.optimizer.param_groups[0]
        self._rate, self._scale = 0.0, 1.0

    def gradients(self, number: int) -> None:
        if not self._is_decoupled:
            self.ranks.add_orthogonality(self._loss_scale())

    def clipped(self, record: Record) -> None:
        self._parameters.share_gradients()
        self._rate = max(record.get("effective_lr", {"": 0.0}).values())
        self._scale = self._loss_scale()

    def moved(self, number: int) -> None:
        # The scaler lowers its scale after an fp16 overflow, for which it skips the step.
        if self._loss_scale() < self._scale:
            return
        if self._is_decoupled:
            self.ranks.make_orthogonal(self._rate)
        self.ranks.after_step(number)

    def state_dict(self) -> Any:
        return self.ranks.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.ranks.load_state_dict(state)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())


class RankAllocation:
    """Prunes the least important triplets over all layers of all components.

    As in PEFT, the importance depends on the weights after the optimizer's step and on the clipped
    gradients of that step, which include the orthogonality term. Reported losses do not include the
    term.

    Args:
        adapters: Trained adapters, each with a `SingularParametrization`.
        schedule: Total number of triplets by step.
        orthogonality_weight: Weight of the orthogonality term.
    """

    def __init__(
        self,
        adapters: Iterable[LayerAdapter],
        schedule: BudgetSchedule,
        orthogonality_weight: float,
    ) -> None:
        self.schedule = schedule
        self.orthogonality_weight = orthogonality_weight
        self._adapters = list(adapters)
        self._diagonals = [
            cast(SingularParametrization, adapter.parametrization).diagonal
            for adapter in self._adapters
        ]
        self._parameters: list[nn.Parameter] = [
            *self._diagonals,
            *(adapter.down for adapter in self._adapters),
            *(adapter.up for adapter in self._adapters),
        ]
        self._sensitivity = Sensitivity.of(self._parameters)
        self._kept: list[Tensor] | None = None

    @torch.no_grad()
    def add_orthogonality(self, loss_scale: float = 1.0) -> None:
        """Add the gradients of the orthogonality term.

        Args:
            loss_scale: Scale of all gradients (fp16).
        """
        for parameter, grad in self._orthogonality(loss_scale * self.orthogonality_weight):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    @torch.no_grad()
    def make_orthogonal(self, rate: float) -> None:
        """Apply a gradient step on the orthogonality term of each factor (decoupled, for Prodigy).

        Prodigy estimates its step size from the gradients. As long as the triplets are close to 0,
        the gradients of the term are far larger than the gradients of the loss.

        Args:
            rate: Step size of the optimizer.
        """
        factors = 2 * len(self._adapters)
        for parameter, grad in self._orthogonality(rate * self.orthogonality_weight * factors):
            parameter.sub_(grad)

    def _orthogonality(self, weight: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each factor with its gradient of the weighted term; empty if the weight is 0."""
        if not weight:
            return []
        downs = [adapter.down for adapter in self._adapters]
        ups = [adapter.up for adapter in self._adapters]
        rows = [d.detach().flatten(1) for d in downs] + [u.detach().flatten(1).t() for u in ups]
        gradients = orthogonality_gradients(rows, weight)
        count = len(downs)
        shaped = [grad.view_as(down) for grad, down in zip(gradients, downs, strict=False)]
        shaped += [g.t().reshape(up.shape) for g, up in zip(gradients[count:], ups, strict=True)]
        return list(zip([*downs, *ups], shaped, strict=True))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the allocation after an optimizer step, before gradients are reset.

        Args:
            step: Number of the step, counted from 1.
        """
        parameters = self._parameters
        if self._kept is None:
            if step < self.schedule.last:
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                self._sensitivity.update([p.detach() for p in parameters], gradients)
            # If the step of the final selection was skipped, the next step makes the selection.
            if step < self.schedule.last and not self.schedule.chooses(step):
                return
            masks = kept_triplets(self.importance(), self.schedule.budget(step))
            if step >= self.schedule.last:
                self._kept = masks
        else:
            masks = self._kept
        for diagonal, mask in zip(self._diagonals, masks, strict=True):
            diagonal.masked_fill_(~mask, 0)

    def importance(self) -> list[Tensor]:
        """Return the importance of the triplets of each layer, ``(r,)``."""
        scores, count = self._sensitivity.scores(), len(self._adapters)
        thirds = (scores[i * count : (i + 1) * count] for i in range(3))
        return [triplet_importance(*layer) for layer in zip(*thirds, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return sensitivity and selection, on the CPU."""
        masks = self._kept
        return {
            "mean": [tensor.cpu() for tensor in self._sensitivity.mean],
            "uncertainty": [tensor.cpu() for tensor in self._sensitivity.uncertainty],
            "kept": None if masks is None else [mask.cpu() for mask in masks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        for name in ("mean", "uncertainty"):
            for tensor, saved in zip(getattr(self._sensitivity, name), state[name], strict=True):
                tensor.copy_(saved)
        masks = state["kept"]
        device = self._diagonals[0].device
        self._kept = None if masks is None else [mask.to(device) for mask in masks]
