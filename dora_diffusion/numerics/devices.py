"""Devices of this machine and their capabilities, as reported by torch.

torch names NVIDIA's and AMD's GPUs ``cuda``, Intel's ``xpu`` and Apple's ``mps``. Importing this
module does not import torch. Memory functions do nothing if no other module has imported torch.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TRUE = ("1", "true", "yes", "on", "y", "t")


def default_device() -> str:
    """Return the kind of the default device: the accelerator if there is one, else the CPU.

    Accelerate's ``ACCELERATE_USE_CPU`` is respected.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return "cpu"
    return accelerator() or "cpu"


def accelerator() -> str | None:
    """Return the kind of the accelerator that torch can use; None if there is none."""
    import torch

    # Checked first, since torch 2.6 raises an error if there is no accelerator.
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def device_name(kind: str) -> str:
    """Return the name of the first device of a kind."""
    import torch

    if kind == "mps":
        name: str = getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
        return name
    return "CPU" if kind == "cpu" else str(_home(kind).get_device_name(0))


def has_own_memory(kind: str) -> bool:
    """Return whether a kind of device has its own memory. Apple's GPUs share the machine's."""
    return kind not in ("cpu", "mps")


def has_float64(kind: str) -> bool:
    """Return whether a kind of device supports float64. Apple's GPUs and some of Intel's do not."""
    return kind != "mps" and (kind != "xpu" or _intel_has_float64())


@lru_cache
def _intel_has_float64() -> bool:
    return bool(_home("xpu").get_device_properties(0).has_fp64)


def has_bf16(kind: str) -> bool:
    """Return whether a kind of device supports bfloat16 natively, including torch's autocast.

    Apple's GPUs support it since macOS 14 and torch 2.6. Older NVIDIA GPUs emulate it, slower than
    float16.
    """
    import torch

    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0) and torch_version() >= (2, 6)
    supported = getattr(_home(kind), "is_bf16_supported", None)
    return True if supported is None else bool(supported(including_emulation=False))


def has_gradient_scaler(kind: str) -> bool:
    """Return whether a kind of device can train in fp16.

    CPUs cannot. Apple's GPUs can since torch 2.8; before, the gradient scaler uses float64.
    """
    return kind != "cpu" and (kind != "mps" or torch_version() >= (2, 8))


def has_8bit_adam(kind: str) -> bool:
    """Return whether bitsandbytes is installed and supports a kind of device."""
    return kind == "cuda" and find_spec("bitsandbytes") is not None


def has_fused_optimizers(kind: str) -> bool:
    """Return whether torch has fused optimizers for a kind of device."""
    from torch.utils import _foreach_utils

    return kind in _foreach_utils._get_fused_kernels_supported_devices()


def mixes_batch_norm(kind: str) -> bool:
    """Return whether batch normalization takes 16-bit activations with float32 vectors on a device.

    Other kinds of devices than these were not tried.
    """
    return kind in ("cpu", "cuda")


def keeps_random_state(kind: str) -> bool:
    """Return whether torch's gradient checkpointing restores the random state of a kind of device.

    It requires the attribute ``_initialized`` of the backend, which Apple's backend does not have.
    """
    return kind == "cpu" or hasattr(_home(kind), "_initialized")


def random_state(kind: str) -> Tensor:
    """Return the state of the random generator of a device."""
    state: Tensor = _home(kind).get_rng_state()
    return state


def set_random_state(kind: str, state: Tensor) -> None:
    """Restore a state of `random_state`."""
    _home(kind).set_rng_state(state)


def free_device_memory(kind: str) -> int | None:
    """Return the free bytes of a device's own memory; None if it shares memory or is unknown."""
    mem_get_info = getattr(_home(kind), "mem_get_info", None)
    return None if mem_get_info is None else int(mem_get_info()[0])


def memory_limit(kind: str) -> int | None:
    """Return the largest number of bytes that a device uses of shared memory; None if unknown."""
    limit = getattr(_home(kind), "recommended_max_memory", None)
    return None if limit is None else int(limit())


def peak_memory() -> int | None:
    """Return the peak of this process's accelerator memory in bytes; None if unknown."""
    home = _home_in_use()
    # Apple's backend has no peak, but its driver keeps allocated memory until `release_memory`.
    for name in ("max_memory_allocated", "driver_allocated_memory"):
        if hasattr(home, name):
            return int(getattr(home, name)())
    return None


def release_memory() -> None:
    """Release unused accelerator memory that the allocator caches."""
    home = _home_in_use()
    if home is not None:
        home.empty_cache()


def _home(kind: str) -> Any:
    """Return the module of torch for a kind of device, such as ``torch.cuda``."""
    import torch

    return getattr(torch, kind)


def _home_in_use() -> Any:
    if "torch" not in sys.modules:
        return None
    kind = accelerator()
    return None if kind is None else _home(kind)


def torch_version() -> tuple[int, int]:
    """Return the major and minor version of torch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
