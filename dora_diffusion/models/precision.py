"""Which device is used, and what precision ``auto`` means on it."""

from __future__ import annotations

import os

import torch

from dora_diffusion.config.checks import require_choice
from dora_diffusion.config.precision import AUTO, DTYPES, precision_name
from dora_diffusion.memory import Device, auto_precision, default_device

__all__ = ["PRECISION_DTYPES", "auto_dtype", "default_device", "dtype_of", "precision_of"]

# By Accelerate's names.
PRECISION_DTYPES: dict[str, torch.dtype] = {
    precision_name(dtype): getattr(torch, dtype) for dtype in DTYPES
}


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
    require_choice("dtype", name, (AUTO, *DTYPES))
    return PRECISION_DTYPES[precision_name(name)]


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
