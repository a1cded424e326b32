"""Averages of the trained weights. A run samples, validates and saves them as its result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.optimizer import role_of
from dora_diffusion.training.processes import gather, load

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class Average(Hook):
    """Base class of weight averages. Trained weights are restored exactly after each use.

    Args:
        step: Step of the run.
    """

    name = "live"

    def __init__(self, step: Step) -> None:
        self._parameters, self._weights = step.parameters, step.weights

    def enter(self) -> None:
        """Set the parameters to the average."""
        raise NotImplementedError

    def leave(self) -> None:
        """Prepare training to continue. The caller then restores the trained values."""
        raise NotImplementedError

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set the parameters to the average inside the block."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self.enter()
            self._parameters.finish()
            yield
        finally:
            self.leave()
            _copy(trained, self._parameters)
            self._parameters.finish()

    def state_dict(self) -> Any:
        """Return copies of the trained weights. The adapter of a checkpoint has the average."""
        return {name: gather(p).clone() for name, p in self._weights.parameters().items()}

    def load_state_dict(self, state: Any) -> None:
        self.leave()
        load(state, self._weights.parameters())


class EmaCode(FeatureCode):
    """Exponential moving average in a run."""

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [MovingAverage(step)]


class ScheduleFreeCode(FeatureCode):
    """Average of a schedule-free optimizer in a run."""

    def hooks(self, step: Step) -> Sequence[Hook]:
        return [ScheduleFreeAverage(step)]


class MovingAverage(Average):
    """Exponential moving average (EMA).

    The decay after n steps is ``min(decay, (1 + n) / (10 + n))``. The smaller decay of the first
    steps removes the initial weights from the average.

    Args:
        step: Step of a run with ``ema_decay``, the largest decay.
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        assert step.config.ema_decay is not None
        self._decay = step.config.ema_decay
        self._average = [parameter.detach().clone() for parameter in step.parameters]

    @torch.no_grad()
    def done(self, number: int) -> None:
        decay = min(self._decay, (1 + number) / (10 + number))
        get_ema_multi_avg_fn(decay)(self._average, list(self._parameters), number)
        roles = (role_of(group) for group in self._parameters.groups for _ in group["params"])
        for role, average, trained in zip(roles, self._average, self._parameters, strict=True):
            if role == "diagonal":  # AdaLoRA: a pruned triplet is pruned in the average too.
                average.masked_fill_(trained == 0, 0)

    def enter(self) -> None:
        _copy(self._average, self._parameters)

    def leave(self) -> None:
        _copy(self._parameters, self._average)


class ScheduleFreeAverage(Average):
    """Average that a schedule-free optimizer keeps (arXiv:2405.15682).

    Args:
        step: Step of a run with such an optimizer.
    """

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._optimizer = step.optimizer

    def enter(self) -> None:
        self._optimizer.eval()

    def leave(self) -> None:
        self._optimizer.train()


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    torch._foreach_copy_(list(target), list(source))
