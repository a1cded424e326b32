"""Tensors from the host to the device and back, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU fetches it while the program continues."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From memory that may be swapped out, a copy is waited for.
        tensor = tensor.pin_memory()
    # Towards the host, a copy that is not waited for is read before it is there.
    return tensor.to(device, non_blocking=device.type != "cpu")


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host. What is returned waits for that copy, and gives it.

    Read a step later, it waits for nothing; a copy that is only started then comes after all work
    of the step in between.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read
