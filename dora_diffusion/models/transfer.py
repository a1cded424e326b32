"""Tensors from the host to the device, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU fetches it while the program continues."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From memory that may be swapped out, a copy is waited for.
        tensor = tensor.pin_memory()
    # Towards the host, a copy that is not waited for is read before it is there.
    return tensor.to(device, non_blocking=device.type != "cpu")
