"""Which device is used, and what precision ``auto`` means on it."""

from __future__ import annotations

import os

import torch

from dora_diffusion.config import ConfigError
from dora_diffusion.memory import Device, auto_precision, default_device

__all__ = ["AUTO", "PRECISION_DTYPES", "auto_dtype", "default_device", "dtype_of", "precision_of"]

AUTO = "auto"
# What Accelerate calls the precisions.
PRECISION_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def auto_dtype(device: torch.device | str) -> torch.dtype:
    """The precision that ``auto`` means on a device, as `auto_precision` says it."""
    kind = torch.device(device).type
    has_bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return PRECISION_DTYPES[auto_precision(Device(kind, has_bf16=has_bf16))]


def dtype_of(name: str, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype that ``--dtype`` names: ``auto``, ``float32``, ``float16`` or ``bfloat16``.

    Args:
        name: As on the command line.
        device: Where the model will be; None is `default_device`.

    Raises:
        ConfigError: If there is no such dtype.
    """
    if name == AUTO:
        return auto_dtype(default_device() if device is None else device)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype is {name!r}; it must be auto, float32, float16 or bfloat16")
    return dtype


def precision_of(name: str, device: torch.device | str | None = None) -> str:
    """The precision that ``--mixed_precision`` names, ``auto`` resolved: no, fp16 or bf16.

    ``accelerate launch --mixed_precision`` settles ``auto``; its ``no`` does not, which it sets
    unasked.
    """
    if name != AUTO:
        return name
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if launched in ("fp16", "bf16"):
        return launched
    dtype = dtype_of(AUTO, device)
    return next(word for word, known in PRECISION_DTYPES.items() if known == dtype)
