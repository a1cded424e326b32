"""A base model with adapters merged in, tensor by tensor, wherever it is written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dora_diffusion.export.output import ExportError
from dora_diffusion.formats.checkpoint.keys import Entry, build_entry
from dora_diffusion.formats.files.stream import TensorReader, TensorSpec
from dora_diffusion.merge import (
    MergeError,
    WeightedAdapter,
    check_dtype,
    layers_of,
    merge_tensor,
)
from dora_diffusion.numerics.merging import cast_error, merge_error

_CHECKED_TENSORS = 8


class BaseWeights(Protocol):
    """Base weights by canonical tensor name: a ``PipelineFolder`` or a ``CheckpointFile``."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor."""

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes by canonical module name."""


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

    base: BaseWeights
    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            for name in adapter.layers:
                check_dtype(name, self.base.specs[f"{name}.weight"].dtype)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape that the tensor is written with."""
        spec = self.base.specs[name]
        if self.dtype is None or name.startswith("vae.") or not spec.dtype.is_floating_point:
            return spec
        return TensorSpec(self.dtype, spec.shape)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The merged tensor, in the dtype that it is written with or in another."""
        layers = layers_of(name, self.adapters)
        try:
            return merge_tensor(self.base[name], layers, dtype or self.spec(name).dtype)
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from error

    def build(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the single-file layout, from merged sources."""
        return build_entry(entry, (self.tensor(name, dtype) for name in entry.sources))

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
        allowed = cast_error(wanted, written.dtype) + 2 * build_entry(entry, errors)
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
