"""Which device is used, and what precision ``auto`` means on it."""

from __future__ import annotations

import os

import torch

from dora_diffusion.config import ConfigError

AUTO = "auto"
# What Accelerate calls the precisions.
PRECISION_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TRUE = ("1", "true", "yes", "on", "y", "t")


def default_device() -> str:
    """The device that is used where none is named: a CUDA GPU, Apple's, or the CPU.

    Accelerate's ``ACCELERATE_USE_CPU`` is honoured.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def auto_dtype(device: torch.device | str) -> torch.dtype:
    """The precision that ``auto`` means on a device.

    bfloat16 on a CUDA GPU that computes it, else float16. float32 elsewhere: CPUs emulate half
    precision slowly, and Apple's GPUs lack the gradient scaler that float16 needs.
    """
    if torch.device(device).type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


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
