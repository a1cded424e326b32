"""Which layers need a path of their own, read back from the device without waiting for it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


class DeferredFlags:
    """Flags of one step's channels, read in the next step, when they have long arrived.

    On a CPU, where nothing waits, and in the first step they are read at once. For a loop of steps
    in which nothing but its optimizer changes parameters: then a channel comes near to what is
    flagged before it is there. What was written to a base weight through ``.data`` is noticed a
    step late.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any, list[int]] | None = None

    def layers(self, flagged: Tensor, sizes: Sequence[int]) -> set[int]:
        """The layers to which flagged channels belong.

        Args:
            flagged: Of all channels, ``(sum of sizes,)`` bool.
            sizes: Channels of each layer.
        """
        before, self._sent = self._sent, None
        if reads_at_once(flagged.device):
            return _owners(flagged.cpu(), sizes)
        self._sent = flagged.to("cpu", non_blocking=True), record_event(flagged), list(sizes)
        if before is None or before[2] != list(sizes):
            before = self._sent
        values, event, _ = before
        event.synchronize()
        return _owners(values, sizes)


def reads_at_once(device: torch.device) -> bool:
    """Whether nothing waits, or a copy cannot be waited for without waiting for all else."""
    return device.type != "cuda"


def record_event(tensor: Tensor) -> Any:
    """An event on the device of a tensor, after what was started there so far."""
    return torch.cuda.current_stream(tensor.device).record_event()


def _owners(flagged: Tensor, sizes: Sequence[int]) -> set[int]:
    """Which layers the flagged channels of the concatenated vector belong to."""
    ends = list(accumulate(sizes))
    return {bisect_right(ends, channel) for channel in flagged.nonzero().flatten().tolist()}
