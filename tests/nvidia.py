"""An NVIDIA GPU, emulated (`tests.emulation`), with what only CUDA has.

Products of bfloat16 matrices in float32, pinned memory, events, and a generator of its own. Not
emulated: ``torch.Generator("cuda")``, several streams, and what needs several devices.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulation import EmulatedGPU, emulated

_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp)
_SUMS = (F.softmax, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum, torch.cumsum)


class _Event:
    """Event: copies that were started before it have arrived when `synchronize` returns."""

    def __init__(self, gpu: NvidiaGPU, **kwargs: Any) -> None:
        self.gpu, self.copies = gpu, 0

    def record(self, stream: Any = None) -> None:
        self.copies = self.gpu.copies_begun

    def synchronize(self) -> None:
        self.gpu.finish_copies(self.copies)


class _NoWaits(collections.Counter[str]):
    def __setitem__(self, name: str, count: int) -> None:
        raise RuntimeError(f"called a synchronizing CUDA operation: {name}")


class NvidiaGPU(EmulatedGPU):
    """``cuda:0``.

    Attributes:
        has_bf16: Whether it computes in bfloat16 itself (Ampere and later).
    """

    kind, backend = "cuda", "CUDA"
    in_float32 = (F.layer_norm, F.group_norm, F.mse_loss, torch.log, *_POWERS, *_SUMS)

    def __init__(self, has_bf16: bool = True) -> None:
        super().__init__()
        self.has_bf16 = has_bf16

    def kernel(self, name: str) -> Any:
        return _widening_product if name == "mm.dtype_out" else super().kernel(name)

    def event(self, *args: Any, **kwargs: Any) -> _Event:
        return _Event(self)

    def stream(self, device: Any = None) -> Any:
        def record_event() -> _Event:
            event = self.event()
            event.record()
            return event

        return SimpleNamespace(
            record_event=record_event, synchronize=self.synchronize, is_capturing=lambda: False
        )

    def synchronize(self, device: Any = None) -> None:
        self.waits["synchronize"] += 1
        self.finish_copies()

    def set_sync_debug_mode(self, mode: str) -> None:
        """``"error"`` raises where a real device would have to be waited for."""
        self.waits = _NoWaits() if mode == "error" else collections.Counter()

    def say_so(self, patch: pytest.MonkeyPatch) -> None:
        major, minor = (8, 6) if self.has_bf16 else (7, 5)
        about = SimpleNamespace(
            name="NVIDIA GeForce RTX 3090", total_memory=24 * 2**30, major=major, minor=minor
        )
        for name, value in {
            "is_available": lambda: True, "is_initialized": lambda: True, "_initialized": True,
            "_lazy_init": lambda: None, "device_count": lambda: 1, "current_device": lambda: 0,
            "set_device": lambda device: None, "get_device_name": lambda *_: about.name,
            "_exchange_device": lambda device: 0, "_maybe_exchange_device": lambda device: 0,
            "get_device_properties": lambda *_: about, "is_current_stream_capturing": lambda: False,
            "get_device_capability": lambda *_: (major, minor),
            "mem_get_info": lambda *_: (20 * 2**30, 24 * 2**30),
            "is_bf16_supported": lambda including_emulation=True:
                self.has_bf16 or including_emulation,
            "manual_seed": self.seed, "manual_seed_all": self.seed,
            "get_rng_state": lambda *_: self.random_state, "set_rng_state": self.set_random_state,
            "empty_cache": self.release, "synchronize": self.synchronize,
            "max_memory_allocated": lambda *_: 3 * 2**30,
            "reset_peak_memory_stats": lambda *_: None,
            "current_stream": self.stream, "Event": self.event,
            "set_sync_debug_mode": self.set_sync_debug_mode,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)


def _widening_product(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """CuBLAS's product of 16-bit matrices, summed and written in float32."""
    kinds = [left.dtype, right.dtype, dtype, out.dtype]
    if kinds != [torch.bfloat16] * 2 + [torch.float32] * 2:
        raise RuntimeError(f"mm takes no such dtypes: {kinds}")
    return torch.mm(left.float(), right.float(), out=out)


@contextmanager
def nvidia_gpu(has_bf16: bool = True) -> Iterator[NvidiaGPU]:
    """Have an NVIDIA GPU for as long as the block lasts."""
    gpu = NvidiaGPU(has_bf16)
    with emulated(gpu):
        yield gpu
