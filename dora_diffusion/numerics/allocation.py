"""Rank allocation: which directions of which layers are worth their rank.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv:2303.10512. ``delta = s P diag(l) Q``: a triplet is an entry of l with its column of P and its
row of Q. Triplets that matter little to the loss have their l set to 0, until a budget is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the smoothed sensitivity and of its uncertainty (section 3.2), as in PEFT.
BETA_1 = BETA_2 = 0.85


@dataclass(frozen=True)
class BudgetSchedule:
    """Budget of triplets for all layers together (section 3.3).

    Attributes:
        start: Triplets at the start.
        target: Triplets in the end.
        steps: Optimizer steps of the run.
        warmup: Steps with all of them.
        final: Steps in the end with a fixed choice.
        interval: Steps from one choice to the next, in between.

    Raises:
        ValueError: If nothing is left between warm-up and end.
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
                f"of {self.steps} steps to allocate ranks in"
            )

    @property
    def last(self) -> int:
        """The step of the choice that stays."""
        return self.steps - self.final

    def budget(self, step: int) -> int:
        """Triplets after a step, counted from 1: cubic from start to target."""
        if step <= self.warmup:
            return self.start
        if step >= self.last:
            return self.target
        left = 1 - (step - self.warmup) / (self.last - self.warmup)
        return int((self.start - self.target) * left**3 + self.target)

    def chooses(self, step: int) -> bool:
        """Return whether triplets are chosen again after a step."""
        if step >= self.last:
            return step == self.last
        return step > self.warmup and step % self.interval == 0


@dataclass
class Sensitivity:
    """Smoothed importance of every number of some tensors (section 3.2).

    Attributes:
        mean: The moving average of ``|w dL/dw|``, of each tensor.
        uncertainty: The moving average of its distance from that.
    """

    mean: list[Tensor]
    uncertainty: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Sensitivity:
        """Return the sensitivity before any step."""
        return cls(*([torch.zeros_like(t.detach()) for t in tensors] for _ in range(2)))

    @torch.no_grad()
    def update(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add a step to the running means."""
        now = [product.abs_() for product in torch._foreach_mul(list(values), list(gradients))]
        torch._foreach_lerp_(self.mean, now, 1 - BETA_1)
        distance = [d.abs_() for d in torch._foreach_sub(now, self.mean)]
        torch._foreach_lerp_(self.uncertainty, distance, 1 - BETA_2)

    def scores(self) -> list[Tensor]:
        """The importance of every number."""
        return list(torch._foreach_mul(self.mean, self.uncertainty))


def triplet_importance(diagonal: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The importance of a layer's triplets from that of their numbers (section 3.2): ``(r,)``.

    Args:
        diagonal: Of l, ``(r,)``.
        down: Of Q, ``(r, in, *k)``.
        up: Of P, ``(out, r, ...)``.
    """
    return diagonal + down.flatten(1).mean(dim=1) + up.flatten(1).mean(dim=0)


def kept_triplets(importance: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return which triplets of all layers are the ``budget`` most important: ``(r,)`` each, bool.

    Those that are as important as the most important one to go, go too.
    """
    together = torch.cat(list(importance))
    dropped = len(together) - budget
    if dropped <= 0:
        return [torch.ones_like(scores, dtype=torch.bool) for scores in importance]
    threshold = together.kthvalue(dropped).values
    return [scores > threshold for scores in importance]


@torch.no_grad()
def orthogonality_gradients(factors: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Gradients of the term that keeps triplets apart, of each factor.

    The term is ``weight`` times the mean of ``|Q Q^T - I|`` and ``|P^T P - I|`` over all factors,
    in the Frobenius norm, as PEFT has it (section 3.1 has the squares).

    Args:
        factors: Matrices whose rows should be orthonormal, ``(r, n)``: Q, and P transposed.
        weight: Of the term.
    """
    made = []
    for rows in factors:
        distance = rows @ rows.t()
        distance.diagonal().sub_(1)
        share = 2 * weight / len(factors) / distance.norm().clamp_min(1e-30)
        made.append(share * (distance @ rows))
    return made
