"""Precision of products, norms, gains and merges.

Norms and merges are computed in float32, or float64 for float64 weights. However, torch may round
the operands of float32 products to the 10 bits of TensorFloat-32 (convolutions on CUDA do by
default) or the 7 bits of bfloat16, which loses updates that are small compared to the weight.
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
    """Return the dtype in which norms and merges of a tensor are computed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """Cast a tensor to the dtype in which norms and merges are computed."""
    return tensor.to(upcast_dtype(tensor))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a product with a floating-point tensor: autocast's, or the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def to_float64(tensor: Tensor) -> Tensor:
    """Cast a tensor to float64, on the CPU if its device does not support float64.

    The tensor is moved before the cast, since Apple's GPUs cannot do both in one step.
    """
    return (tensor if has_float64(tensor.device.type) else tensor.cpu()).double()


def rounds_float32(device_type: str) -> bool:
    """Return whether torch rounds the operands of float32 matrix products. Never raises."""
    setting = _setting(device_type)
    if setting is not None:
        return setting.fp32_precision in _ROUNDED
    if device_type == "cuda":
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return device_type == "cpu" and torch.get_float32_matmul_precision() == "medium"


@lru_cache
def _setting(device_type: str) -> Any:
    """Return the object with the setting ``fp32_precision``; None before torch 2.9.

    The setting includes the older switches. After it has been set, reading an older one, such as
    `torch.backends.cuda.matmul.allow_tf32`, raises a RuntimeError.
    """
    library = {"cuda": "cuda", "cpu": "mkldnn"}.get(device_type, "")
    setting = getattr(getattr(torch.backends, library, None), "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


def allow_tf32() -> None:
    """Allow TensorFloat-32 for float32 matrix products on CUDA. Convolutions use it by default.

    This sets the older switch of torch. Setting the newer one would break programs that read the
    older one.

    Warns:
        UserWarning: If there is no GPU with TensorFloat-32.
    """
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        warnings.warn(
            "allow_tf32 has no effect because there is no NVIDIA GPU of Ampere or later",
            stacklevel=1,
        )
    torch.backends.cuda.matmul.allow_tf32 = True


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context with exact float32 matrix products: no autocast, TF32 and bfloat16."""
    # Dynamo of torch 2.6 traces only torch's own contexts, not generators.
    without_autocast = torch.autocast(device.type, enabled=False)
    return without_autocast if torch.compiler.is_compiling() else _exact(without_autocast, device)


@contextmanager
def _exact(without_autocast: torch.autocast, device: torch.device) -> Iterator[None]:
    with without_autocast, _exact_products(device.type):
        yield


@lru_cache
def _exact_products(device_type: str) -> SharedSwitch:
    """Return a context without rounding in matrix products on a kind of device."""
    return SharedSwitch(partial(_stop_rounding, device_type))


def _stop_rounding(device_type: str) -> Callable[[], None] | None:
    """Disable rounding in matrix products. Returns a function to restore it, None if not needed."""
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
    # "none" follows the more general setting, as it may have done before.
    setting.fp32_precision = "none"
    if setting.fp32_precision != before:
        setting.fp32_precision = before
