"""Rank allocation between layers by importance (AdaLoRA).

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv:2303.10512. ``delta = s P diag(l) Q``: a triplet is an entry of l with its column of P and its
row of Q. Unimportant triplets are pruned (l is set to 0) until a budget is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
