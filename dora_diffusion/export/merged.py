"""A base model with adapters merged in, tensor by tensor, wherever it is written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.export.output import ExportError
from dora_diffusion.families import Family
from dora_diffusion.formats.checkpoint.entries import Entry
from dora_diffusion.formats.checkpoint.weights import ModelWeights, check_dtype
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.merge import (
    MergeError,
    WeightedAdapter,
    layers_of,
    merge_tensor,
)
from dora_diffusion.numerics.merging import cast_error, merge_error

_CHECKED_TENSORS = 8


@dataclass(frozen=True)
class MergedModel:
    """The tensors of a base model with adapters merged in, computed when asked for.

    Attributes:
        base: The base weights.
        adapters: What is merged.
        dtype: Of the UNet and the text encoders; None keeps the base's.

    Raises:
        MergeError: If an adapted weight of the base is quantised.
    """

    base: ModelWeights
    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            for name in adapter.layers:
                check_dtype(name, self.base.specs[f"{name}.weight"].dtype)

    @property
    def family(self) -> Family | None:
        """That of the base."""
        return self.base.family

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape that each tensor is written with."""
        return {
            name: spec
            if self.dtype is None or name.startswith("vae.") or not spec.dtype.is_floating_point
            else TensorSpec(self.dtype, spec.shape)
            for name, spec in self.base.specs.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """The merged tensor, as it is written."""
        return self.tensor(name, self.specs[name].dtype)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """The merged tensor in a dtype, computed in float32 and cast once."""
        layers = layers_of(name, self.adapters)
        try:
            return merge_tensor(self.base[name], layers, dtype)
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from error

    def build(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the single-file layout, from merged sources."""
        return entry.build(
            self[name] if dtype is None else self.tensor(name, dtype) for name in entry.sources
        )

    def explains(self, entry: Entry, written: Tensor) -> bool:
        """Whether a tensor is the merged one, but for the rounding that is due.

        The same bits are what is found in general. But no BLAS promises them, and a merge that is
        right must not be refused, so where they differ each number is compared by what rounding in
        float32 and one cast may have made of it: a bound of its own for each, which a
        tensor that is damaged, another one or merged with another strength does not keep.
        """
        if torch.equal(written, self.build(entry)):
            return True
        wanted = self.build(entry, torch.float32)
        errors = (self._error(name) for name in entry.sources)
        allowed = cast_error(wanted, written.dtype) + 2 * entry.build(errors)
        # In this form, so that a NaN is a difference, too.
        return bool(((written.float() - wanted).abs() <= allowed).all())

    def _error(self, name: str) -> Tensor:
        return merge_error(self.base[name], layers_of(name, self.adapters))

    def is_adapted(self, entry: Entry) -> bool:
        """Whether an adapter acts on one of the entry's sources."""
        return any(layers_of(name, self.adapters) for name in entry.sources)


def check_sample(path: Path, entries: Sequence[Entry], merged: MergedModel) -> None:
    """Recompute some adapted tensors and compare them with the reopened file.

    Raises:
        ExportError: If one differs by more than its rounding.
    """
    adapted = [entry for entry in entries if merged.is_adapted(entry)]
    step = max(1, len(adapted) // _CHECKED_TENSORS)
    with TensorReader(path) as reader:
        for entry in adapted[::step][:_CHECKED_TENSORS]:
            if not merged.explains(entry, reader[entry.key]):
                raise ExportError(f"{path.name}: {entry.key} did not read back as it was merged")
