"""Precision of products, norms, gains and merges.

Norms and merges take float32, or float64 for float64 weights. But float32 says less than it seems:
torch may round the operands of a float32 product to the 10 bits of TensorFloat-32 (convolutions on
CUDA do so by default) or to bfloat16's 7, which loses an update that is small beside its weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.numerics.devices import has_float64
from dora_diffusion.numerics.threads import SharedSwitch

_ROUNDED = ("tf32", "bf16")


def upcast_dtype(tensor: Tensor) -> torch.dtype:
    """The precision that norms and merges of a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision that norms and merges are computed in."""
    return tensor.to(upcast_dtype(tensor))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for a product of a floating tensor: autocast's dtype, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU where its device has none, which an operation brings back.

    Two steps there: Apple's GPUs do not cast on the way to the CPU either.
    """
    return (tensor if has_float64(tensor.device.type) else tensor.cpu()).double()


def rounds_float32(device_type: str) -> bool:
    """Return whether torch is set to round the operands of ``@`` in float32. Never raises."""
    setting = _setting(device_type)
    if setting is not None:
        return setting.fp32_precision in _ROUNDED
    if device_type == "cuda":
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return device_type == "cpu" and torch.get_float32_matmul_precision() == "medium"


@lru_cache
def _setting(device_type: str) -> Any:
    """The object with the setting ``fp32_precision``; None before torch 2.9, which has none.

    It covers the older switches too, which in their turn cannot be read once this one was set:
    `torch.backends.cuda.matmul.allow_tf32` raises a RuntimeError then.
    """
    library = {"cuda": "cuda", "cpu": "mkldnn"}.get(device_type, "")
    setting = getattr(getattr(torch.backends, library, None), "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


def allow_tf32() -> None:
    """Allow TensorFloat-32 for float32 matrix products on CUDA; convolutions use it by default.

    By torch's older switch: programs that read it would fail if the newer one was set.

    Warns:
        UserWarning: If no GPU here has TensorFloat-32.
    """
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        warnings.warn(
            "allow_tf32 has no effect because there is no NVIDIA GPU of Ampere or later",
            stacklevel=1,
        )
    torch.backends.cuda.matmul.allow_tf32 = True


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Products of matrices as precise as their dtype: without autocast, TF32 and bfloat16."""
    # Not a generator: Dynamo of torch 2.6 traces torch's own contexts only.
    without_autocast = torch.autocast(device.type, enabled=False)
    return without_autocast if torch.compiler.is_compiling() else _exact(without_autocast, device)


@contextmanager
def _exact(without_autocast: torch.autocast, device: torch.device) -> Iterator[None]:
    with without_autocast, _exact_products(device.type):
        yield


@lru_cache
def _exact_products(device_type: str) -> SharedSwitch:
    """Products of matrices on a kind of device round nothing inside of it."""
    return SharedSwitch(partial(_stop_rounding, device_type))


def _stop_rounding(device_type: str) -> Callable[[], None] | None:
    """Disable rounding in products of matrices. Returns what undoes it, if they did."""
    if not rounds_float32(device_type):
        return None
    setting = _setting(device_type)
    if setting is not None:
        before = setting.fp32_precision
        setting.fp32_precision = "ieee"
        return lambda: _restore(setting, before)
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(previous)


def _restore(setting: Any, before: str) -> None:
    # Where it followed a more general setting, it does so again.
    setting.fp32_precision = "none"
    if setting.fp32_precision != before:
        setting.fp32_precision = before
