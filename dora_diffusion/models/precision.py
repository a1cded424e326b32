"""Precision of models and training, and its defaults by device."""

from __future__ import annotations

import os

import torch

from dora_diffusion.config.fields import (
    AUTO,
    DTYPES,
    ConfigError,
    precision_name,
    require,
    require_choice,
)
from dora_diffusion.models.memory import Device, auto_precision
from dora_diffusion.numerics.devices import default_device, has_bf16, has_gradient_scaler

# Keys are the names of Accelerate.
PRECISION_DTYPES: dict[str, torch.dtype] = {
    precision_name(dtype): getattr(torch, dtype) for dtype in DTYPES
}


def auto_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of precision ``auto`` on a device (`auto_precision`)."""
    kind = torch.device(device).type
    known = Device(kind, has_bf16=has_bf16(kind), has_gradient_scaler=has_gradient_scaler(kind))
    return PRECISION_DTYPES[auto_precision(known)]


def dtype_of(name: str, device: torch.device | str | None = None) -> torch.dtype:
    """Return the dtype of a name: ``auto``, ``float32``, ``float16`` or ``bfloat16``.

    Args:
        name: Value of ``--dtype``.
        device: Device of the model. Default: `default_device`.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name == AUTO:
        return auto_dtype(default_device() if device is None else device)
    require_choice("dtype", name, (AUTO, *DTYPES))
    return PRECISION_DTYPES[precision_name(name)]


def precision_of(name: str, device: torch.device | str | None = None) -> str:
    """Resolve ``--mixed_precision`` to no, fp16 or bf16.

    For ``auto``, fp16 or bf16 of ``accelerate launch --mixed_precision`` has precedence. Its ``no``
    is ignored, since the launcher sets it by default.
    """
    if name != AUTO:
        return name
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if launched in ("fp16", "bf16"):
        return launched
    dtype = dtype_of(AUTO, device)
    return next(word for word, known in PRECISION_DTYPES.items() if known == dtype)


def require_computes(device: torch.device | str, dtype: torch.dtype) -> None:
    """Check that a device computes in a dtype.

    Raises:
        ConfigError: If it does not, as Apple's GPU with bfloat16 on old systems.
    """
    kind = torch.device(device).type
    require(
        kind != "mps" or dtype != torch.bfloat16 or has_bf16(kind),
        "bfloat16 on Apple's GPU needs macOS 14 and torch 2.6; use float16 (fp16) or float32 (no)",
    )


def require_trains(device: torch.device | str, precision: str) -> None:
    """Check that a device can train in a precision: no, fp16 or bf16.

    Raises:
        ConfigError: If it cannot.
    """
    kind = torch.device(device).type
    require_computes(device, PRECISION_DTYPES[precision])
    if precision == "fp16" and not has_gradient_scaler(kind):
        needs = "a GPU; use bf16 or no" if kind == "cpu" else "torch 2.8 on Apple's GPU; use no"
        raise ConfigError(f"mixed_precision fp16 needs {needs}", "mixed_precision")
