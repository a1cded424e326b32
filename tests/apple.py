"""Apple's GPU, emulated (`tests.emulation`): no float64, and no bfloat16 where it is told so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.emulation import EmulatedGPU, emulated

DEVICE = torch.device("mps", 0)
WIDE = (torch.float64, torch.complex128)


class AppleGPU(EmulatedGPU):
    """``mps:0``.

    Attributes:
        has_bf16: Whether bfloat16 is allowed (macOS 14).
    """

    kind, backend, can_pin = "mps", "MPS", False

    def __init__(self, has_bf16: bool = True) -> None:
        super().__init__()
        self.has_bf16 = has_bf16

    def refuse_dtype(self, dtype: torch.dtype) -> None:
        if dtype in WIDE:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64. Please use float32 instead."
            )
        if dtype == torch.bfloat16 and not self.has_bf16:
            raise TypeError("BFloat16 is not supported on MPS")

    def say_so(self, patch: pytest.MonkeyPatch) -> None:
        mps = torch.backends.mps
        patch.setattr(mps, "is_built", lambda: True)
        # Wrapped, since torch's compiler looks below the wrapper when it is imported.
        patch.setattr(mps, "is_available", functools.wraps(mps.is_available)(lambda: True))
        patch.setattr(mps, "get_name", lambda: "Apple M3 Max", raising=False)
        patch.setattr(mps, "is_macos_or_newer", lambda major, minor: self.has_bf16 or major < 14)
        for name, value in {
            "manual_seed": self.seed, "get_rng_state": lambda: self.random_state,
            "set_rng_state": self.set_random_state, "empty_cache": self.release,
            "recommended_max_memory": lambda: 12 * 2**30,
            "driver_allocated_memory": lambda: 3 * 2**30, "synchronize": self.finish_copies,
        }.items():  # fmt: skip
            patch.setattr(torch.mps, name, value, raising=False)


@contextmanager
def apple_gpu(has_bf16: bool = True) -> Iterator[AppleGPU]:
    """Have an Apple GPU for as long as the block lasts."""
    gpu = AppleGPU(has_bf16)
    with emulated(gpu):
        yield gpu
