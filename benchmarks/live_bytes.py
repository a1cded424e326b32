"""Counts the bytes of tensors that are alive: each storage once, however many views it has."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_diffusion.numerics.quantised import memory_of

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Mode that counts every storage that an operation makes, until nothing holds it any more.

    Exact and the same on every device. Not seen: what a kernel takes while it runs, what an
    allocator rounds up to or keeps, and a device's context.

    Attributes:
        live: Bytes that are alive now.
        peak: The most that were, at the end of an operation.
        at_peak: The bytes of that moment by the label that was current when they were made.
        label: What is made now.
    """

    def __init__(self, device: str | None = None) -> None:
        """Count nothing yet.

        Args:
            device: The type of device whose storages count; None is any.
        """
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self.label = ""
        self.at_peak: dict[str, int] = {}
        self._by_label: collections.Counter[str] = collections.Counter()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def add(self, tensors: Iterable[Any]) -> None:
        """Count the storages of tensors that are not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self.device in (None, tensor.device.type):
                for part in memory_of(tensor):
                    self._add(part.untyped_storage())

    def reset_peak(self) -> None:
        """Reset the peak."""
        self.peak, self.at_peak = self.live, dict(self._by_label)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        if self.live > self.peak:
            self.reset_peak()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        gone = weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = gone, size, self.label
        self._by_label[self.label] += size
        self.live += size

    def _drop(self, key: int) -> None:
        _, size, label = self._storages.pop(key)
        self._by_label[label] -= size
        self.live -= size
