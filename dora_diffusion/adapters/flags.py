"""Flags of ill-conditioned channels and changed weights, read without a wait for the device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

# Devices whose flags are read a step late.
_DEFERRED = {"cuda"}


class _Sent(NamedTuple):
    """Copy of flags on the host, complete after its event."""

    values: Tensor
    event: Any
    sizes: list[int]

    def read(self) -> Tensor:
        """Wait for the copy, and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


class DeferredFlags:
    """Flags of one step's channels, read in the next step to avoid a synchronization.

    Flags are read at once on a CPU and in the first step. Only the optimizer may change parameters
    between steps: it moves a channel slowly enough that the margin flags the channel in time. A
    write to a base weight through ``.data`` is detected one step late.
    """

    def __init__(self) -> None:
        self._sent: _Sent | None = None

    def layers(self, flagged: Tensor, sizes: Sequence[int]) -> set[int]:
        """Return the indices of the layers with flagged channels.

        Args:
            flagged: Flag of each channel, ``(sum of sizes,)`` bool.
            sizes: Number of channels of each layer.
        """
        before = self._sent
        # Other devices need no synchronization, or have no events to wait for a single copy.
        sends_late = flagged.device.type in _DEFERRED
        copy = flagged.to("cpu", non_blocking=sends_late)
        event = record_event(flagged) if sends_late else None
        self._sent = now = _Sent(copy, event, list(sizes))
        is_late = before is not None and before.event is not None and before.sizes == now.sizes
        raised, ends = cast(_Sent, before if is_late else now).read(), list(accumulate(sizes))
        return {bisect_right(ends, channel) for channel in raised.nonzero().flatten().tolist()}


def record_event(tensor: Tensor) -> Any:
    """Record an event on the current stream of a tensor's device."""
    return torch.cuda.current_stream(tensor.device).record_event()
