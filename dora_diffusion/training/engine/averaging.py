"""Weights that a run uses where those are not the ones that it trains: averages of them.

They are sampled, validated, ranked and saved. What trains is put back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.engine.optimizer import SteppedParameters, role_of


class Average:
    """Average of the weights that train, which is what a run uses.

    Args:
        parameters: What the optimizer sees of the parameters that train.
    """

    def __init__(self, parameters: SteppedParameters) -> None:
        self._parameters = parameters

    def update(self, step: int) -> None:
        """Add the parameters after an optimizer step, counted from 1."""

    def enter(self) -> None:
        """Set the parameters to the average."""
        raise NotImplementedError

    def leave(self) -> None:
        """Continue from parameters that are the average; what trains is written then."""
        raise NotImplementedError

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The parameters are the average inside the block."""
        live = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self.enter()
            self._parameters.finish()
            yield
        finally:
            self.leave()
            _copy(live, self._parameters)
            self._parameters.finish()


class MovingAverage(Average):
    """Exponential moving average (EMA).

    The decay after n steps is ``min(decay, (1 + n) / (10 + n))``, so that the start is forgotten.

    Args:
        parameters: What the optimizer sees of the parameters that train.
        decay: The greatest.
    """

    def __init__(self, parameters: SteppedParameters, decay: float) -> None:
        super().__init__(parameters)
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._average, list(self._parameters), step)
        roles = (role_of(group) for group in self._parameters.groups for _ in group["params"])
        for role, average, live in zip(roles, self._average, self._parameters, strict=True):
            if role == "diagonal":  # A triplet that is switched off is so in the average.
                average.masked_fill_(live == 0, 0)

    def enter(self) -> None:
        _copy(self._average, self._parameters)

    def leave(self) -> None:
        _copy(self._parameters, self._average)


class ScheduleFreeAverage(Average):
    """Average that a schedule-free optimizer (arXiv:2405.15682) keeps in its own state.

    Args:
        parameters: What it steps.
        optimizer: It.
    """

    def __init__(self, parameters: SteppedParameters, optimizer: Any) -> None:
        super().__init__(parameters)
        self._optimizer = optimizer

    def enter(self) -> None:
        self._optimizer.eval()

    def leave(self) -> None:
        self._optimizer.train()


def build_average(
    parameters: SteppedParameters, optimizer: Any, config: TrainConfig
) -> Average | None:
    """The average that a run asks for; None: it uses what it trains."""
    if config.is_schedule_free:
        return ScheduleFreeAverage(parameters, optimizer)
    return None if config.ema_decay is None else MovingAverage(parameters, config.ema_decay)


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    torch._foreach_copy_(list(target), list(source))
