"""The tensors of a single file in the original layout, and the canonical ones inside of them.

An `Entry` says which component tensors one tensor of the file is made from, and how. Entries are
planned from names alone, so a checkpoint can be read and written one tensor at a time. Each source
tensor is used exactly once and each name is written once, or there is no plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dora_diffusion.config.families import Family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.checkpoint import (
    ROWS,
    UNET_PREFIX,
    VAE_PREFIX,
    checkpoint_names,
    count_levels,
    is_projection_weight,
    standard_key,
)
from dora_diffusion.formats.names.unet import NameTable, UNetLayout

Operation = Literal["copy", "concatenate", "transpose", "as_conv", "as_integer"]
# Of a text encoder, told by its shape: some programs store them as floating-point numbers.
POSITIONS = ".position_ids"


class CheckpointLayoutError(ValueError):
    """A model that has no single-file layout, or tensors that do not fit it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the single file.

    Attributes:
        key: Its name there.
        sources: Canonical tensor names it is made from, e.g. ``unet.conv_in.weight``.
        operation: How. ``as_conv`` turns ``(C, C)`` into ``(C, C, 1, 1)``; ``concatenate`` joins
            along dim 0.
    """

    key: str
    sources: tuple[str, ...]
    operation: Operation = "copy"

    @classmethod
    def of(cls, key: str, sources: Sequence[str]) -> Entry:
        """The entry of a key, whose name and number of sources tell the operation."""
        operation: Operation = "copy"
        if len(sources) > 1:
            operation = "concatenate"
        elif key.endswith(".text_projection"):
            operation = "transpose"  # open_clip multiplies from the left: x @ P
        elif key.endswith(POSITIONS):
            operation = "as_integer"
        elif is_projection_weight(key):
            operation = "as_conv"
        return cls(key, tuple(sources), operation)

    def spec(self, specs: Mapping[str, TensorSpec]) -> TensorSpec:
        """Dtype and shape, from those of the sources.

        Raises:
            CheckpointLayoutError: If the sources of a joined matrix do not fit together.
        """
        sources = [specs[name] for name in self.sources]
        dtype, shape = sources[0].dtype, sources[0].shape
        if self.operation == "concatenate":
            if any(s.dtype != dtype or s.shape[1:] != shape[1:] for s in sources):
                raise CheckpointLayoutError(f"{listing(self.sources)} cannot be joined")
            return TensorSpec(dtype, (sum(s.shape[0] for s in sources), *shape[1:]))
        if self.operation == "transpose":
            return TensorSpec(dtype, shape[::-1])
        if self.operation == "as_conv" and len(shape) == 2:
            return TensorSpec(dtype, (*shape, 1, 1))
        return TensorSpec(torch.int64, shape) if self.operation == "as_integer" else sources[0]

    def build(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensor, from its sources in their order."""
        sources = list(tensors)
        if self.operation == "concatenate":
            return torch.cat(sources)
        if self.operation == "transpose":
            return sources[0].t().contiguous()
        if self.operation == "as_conv" and sources[0].ndim == 2:
            return sources[0][:, :, None, None]
        return sources[0].to(torch.int64) if self.operation == "as_integer" else sources[0]

    def source_spec(self, spec: TensorSpec) -> TensorSpec:
        """Dtype and shape of each source, from those of the tensor."""
        if self.operation == "concatenate":
            return TensorSpec(spec.dtype, (spec.shape[0] // len(self.sources), *spec.shape[1:]))
        if self.operation == "transpose":
            return TensorSpec(spec.dtype, spec.shape[::-1])
        return TensorSpec(spec.dtype, spec.shape[:2]) if self.operation == "as_conv" else spec

    def source(self, name: str, tensor: Tensor) -> Tensor:
        """One source, from the tensor."""
        if self.operation == "concatenate":
            return tensor.chunk(len(self.sources))[self.sources.index(name)]
        if self.operation == "as_conv":
            return tensor.flatten(1)
        return tensor.t().contiguous() if self.operation == "transpose" else tensor


def names_of_configs(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> NameTable:
    """The names of all tensors of a pipeline, from its configs by component name.

    Raises:
        CheckpointLayoutError: If a component is missing or the layout cannot number its blocks.
    """
    if missing := [name for name in ("unet", "vae", "scheduler") if name not in configs]:
        raise CheckpointLayoutError(f"the pipeline has no {listing(missing)} config")
    try:
        unet = UNetLayout.from_config(configs["unet"])
    except ValueError as error:
        raise CheckpointLayoutError(str(error)) from error
    return checkpoint_names(family, unet, len(configs["vae"]["block_out_channels"]))


def plan_checkpoint(family: Family, table: NameTable, names: Iterable[str]) -> list[Entry]:
    """Plan the single file of a model.

    Args:
        family: Of the model.
        table: Its layout, from `names_of_configs`.
        names: Canonical names of all its tensors.

    Returns:
        Entries sorted by key.

    Raises:
        CheckpointLayoutError: For tensors without a place.
    """
    open_clip = tuple(f"{e.component}." for e in family.text_encoders if e.is_open_clip)
    # open_clip has no numbers of positions.
    paths = {n for n in names if not (n.startswith(open_clip) and n.endswith(POSITIONS))}
    originals = filter(None, map(table.to_original, paths))
    entries = [entry_of(key, table) for key in sorted({o.partition("#")[0] for o in originals})]
    whole = [entry for entry in entries if entry and paths.issuperset(entry.sources)]
    if lost := paths.difference(*(entry.sources for entry in whole)):
        raise CheckpointLayoutError(
            f"tensors without a place in a {family.name} checkpoint: {listing(lost)}"
        )
    return whole


def entry_of(key: str, names: NameTable) -> Entry | None:
    """The entry of a file's tensor, None if it belongs to no component."""
    rows = [names.canonical[key + row] for row in ROWS if key + row in names.canonical]
    if rows:
        return Entry.of(key, rows)
    name = names.to_canonical(standard_key(key))
    return None if name is None else Entry.of(key, [name])


def entries_of_file(family: Family, specs: Mapping[str, TensorSpec]) -> list[Entry]:
    """Entries for the file's UNet, text-encoder and VAE tensors; unknown names have none."""
    unet = [key.removeprefix(UNET_PREFIX) for key in specs if key.startswith(UNET_PREFIX)]
    levels = count_levels(key.removeprefix(VAE_PREFIX) for key in specs)
    names = checkpoint_names(family, UNetLayout.from_original_names(unet), levels)
    entries = (
        entry_of(key, names)
        for key, spec in specs.items()
        if spec.dtype.is_floating_point and not key.endswith(POSITIONS)
    )
    return [entry for entry in entries if entry]
