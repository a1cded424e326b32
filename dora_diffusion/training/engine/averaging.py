"""Weights that a run uses where those are not the ones that it trains: averages of them.

They are sampled, validated, ranked and saved. What trains is put back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dora_diffusion.training.engine.optimizer import SteppedParameters


class MovingAverage:
    """Exponential moving average (EMA) of what trains.

    The decay after n steps is ``min(decay, (1 + n) / (10 + n))``, so that the start is forgotten.

    Args:
        parameters: What the optimizer sees of the parameters that train.
        decay: The greatest.
    """

    def __init__(self, parameters: SteppedParameters, decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the parameters after an optimizer step, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._average, list(self._parameters), step)
        names = (group["name"] for group in self._parameters.groups for _ in group["params"])
        for name, average, live in zip(names, self._average, self._parameters, strict=True):
            if name.endswith("/diagonal"):  # A triplet that is switched off is so in the average.
                average.masked_fill_(live == 0, 0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The parameters are the average inside the block."""
        live = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self._write(self._average)
            yield
        finally:
            self._write(live)

    def restore(self) -> None:
        """Restore the average from the parameters, which a checkpoint has set to it."""
        torch._foreach_copy_(self._average, [parameter.detach() for parameter in self._parameters])

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(list(self._parameters), values)
        self._parameters.finish()
