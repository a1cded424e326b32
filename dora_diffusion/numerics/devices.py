"""Devices here and their capabilities, asked of torch: no other module asks.

torch calls NVIDIA's and AMD's GPUs ``cuda``, Intel's ``xpu`` and Apple's ``mps``. This module is
imported without torch; functions that only report say nothing where no other module imported it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_TRUE = ("1", "true", "yes", "on", "y", "t")


def default_device() -> str:
    """The kind of device that is used where none is named: the accelerator, or the CPU.

    Accelerate's ``ACCELERATE_USE_CPU`` is honoured.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return "cpu"
    return accelerator() or "cpu"


def accelerator() -> str | None:
    """The kind of accelerator that this machine has and this torch can use; None without one."""
    import torch

    # Asked first: torch 2.6 raises an error for the device that there is not.
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def device_name(kind: str) -> str:
    """Return the name of a device of a kind."""
    import torch

    if kind == "mps":
        name: str = getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
        return name
    return "CPU" if kind == "cpu" else str(_home(kind).get_device_name(0))


def built_for() -> str:
    """The accelerators that this torch was built for, with the version of their software."""
    import torch

    for name, attribute in (("ROCm", "hip"), ("CUDA", "cuda"), ("XPU", "xpu")):
        if number := getattr(torch.version, attribute, None):
            return f"{name} {number}"
    return "Apple's GPUs" if torch.backends.mps.is_built() else "the CPU"


def describe_accelerators() -> list[str]:
    """Each accelerator that torch can use, in a line: what it is called, and its memory."""
    import torch

    lines = []
    for kind in ("cuda", "xpu"):
        home = getattr(torch, kind, None)
        if home is not None and home.is_available():
            count = home.device_count()
            lines += [f"{kind}:{index} {_described(home, index)}" for index in range(count)]
    if torch.backends.mps.is_available():
        gib = (memory_limit("mps") or 0) / 2**30
        lines.append(f"mps {device_name('mps')}, at most {gib:.1f} GiB of the machine's memory")
    return lines


def _described(home: Any, index: int) -> str:
    """Name and memory of a device; what a version of torch, or a driver, does not say is left."""
    properties = home.get_device_properties(index)
    parts = [str(properties.name), f"{properties.total_memory / 2**30:.1f} GiB"]
    with contextlib.suppress(Exception):
        parts.append(f"{home.mem_get_info(index)[0] / 2**30:.1f} GiB free")
    with contextlib.suppress(Exception):
        parts.append("compute capability {}.{}".format(*home.get_device_capability(index)))
    return ", ".join(parts)


def has_own_memory(kind: str) -> bool:
    """Return whether a kind of device has memory apart from the machine's: Apple's shares it."""
    return kind not in ("cpu", "mps")


def has_float64(kind: str) -> bool:
    """Return whether a kind of device holds float64: Apple's does not, nor do some of Intel's."""
    return kind != "mps" and (kind != "xpu" or _intel_has_float64())


@lru_cache
def _intel_has_float64() -> bool:
    return bool(_home("xpu").get_device_properties(0).has_fp64)


def has_bf16(kind: str) -> bool:
    """Return whether a kind of device computes in bfloat16 by itself, torch's autocast included.

    On Apple's, since macOS 14 and torch 2.6. Older GPUs of NVIDIA emulate it, slower than float16.
    """
    import torch

    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0) and torch_version() >= (2, 6)
    supported = getattr(_home(kind), "is_bf16_supported", None)
    return True if supported is None else bool(supported(including_emulation=False))


def has_gradient_scaler(kind: str) -> bool:
    """Return whether fp16 can train on a kind of device: not on a CPU, on Apple's since torch 2.8.

    Before, torch's scaler takes its scale through float64.
    """
    return kind != "cpu" and (kind != "mps" or torch_version() >= (2, 8))


def has_8bit_adam(kind: str) -> bool:
    """Return whether bitsandbytes is there for a kind of device."""
    return kind == "cuda" and find_spec("bitsandbytes") is not None


def has_fused_optimizers(kind: str) -> bool:
    """Return whether torch updates all parameters on a kind of device in one kernel."""
    from torch.utils import _foreach_utils

    return kind in _foreach_utils._get_fused_kernels_supported_devices()


def keeps_random_state(kind: str) -> bool:
    """Return whether torch's gradient checkpointing repeats random draws of a kind of device.

    It does for backends that say whether they were initialised; Apple's does not say it.
    """
    return kind == "cpu" or hasattr(_home(kind), "_initialized")


def random_state(kind: str) -> Tensor:
    """The state of a device's random generator."""
    state: Tensor = _home(kind).get_rng_state()
    return state


def set_random_state(kind: str, state: Tensor) -> None:
    """Restore what `random_state` returned."""
    _home(kind).set_rng_state(state)


def free_device_memory(kind: str) -> int | None:
    """Free bytes of a device's own memory; None where it shares the machine's, or cannot tell."""
    about = getattr(_home(kind), "mem_get_info", None)
    return None if about is None else int(about()[0])


def memory_limit(kind: str) -> int | None:
    """The most bytes that a device takes of memory that it shares with the machine, if it says."""
    limit = getattr(_home(kind), "recommended_max_memory", None)
    return None if limit is None else int(limit())


def peak_memory() -> int | None:
    """The most bytes that the accelerator held for this process; None without one, or unknown."""
    home = _home_in_use()
    # Apple's has no peak, but it keeps what it took from the system until `release_memory`.
    for name in ("max_memory_allocated", "driver_allocated_memory"):
        if hasattr(home, name):
            return int(getattr(home, name)())
    return None


def release_memory() -> None:
    """Release the accelerator memory that the allocator keeps of tensors that are gone."""
    home = _home_in_use()
    if home is not None:
        home.empty_cache()


def _home(kind: str) -> Any:
    """The module of torch for a kind of device: ``torch.cuda``, ``torch.mps``..."""
    import torch

    return getattr(torch, kind)


def _home_in_use() -> Any:
    if "torch" not in sys.modules:
        return None
    kind = accelerator()
    return None if kind is None else _home(kind)


def torch_version() -> tuple[int, int]:
    """Major and minor version of the installed torch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
