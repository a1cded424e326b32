"""Convert adapters between programs' formats."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dora_diffusion.export.base import open_model
from dora_diffusion.export.output import ExportError, refuse_existing
from dora_diffusion.formats.adapter.consumers import stated_approximation
from dora_diffusion.formats.adapter.conversions import CONVERSIONS
from dora_diffusion.formats.adapter.embeddings import said_of_embeddings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    embeddings_beside,
    find_adapter,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.metadata import (
    APPROXIMATES,
    APPROXIMATION_ERROR,
    TRAINED_ALPHA,
    AdapterMetadata,
)
from dora_diffusion.formats.adapter.targets.one_base import needs_compensation
from dora_diffusion.formats.adapter.targets.registry import TARGETS
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_weight
from dora_diffusion.formats.files.header import PICKLED
from dora_diffusion.images import thumbnail as make_thumbnail
from dora_diffusion.numerics.low_rank import approximate

# Plain-LoRA approximations, and the format that each is written in.
_APPROXIMATE = {
    name: conversion.plain_lora_in
    for name, conversion in CONVERSIONS.items()
    if conversion.plain_lora_in
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        path: The file or folder.
        target: The format, a key of ``CONVERSIONS``: ``"kohya"`` for a ``comfyui`` file without
            output-axis magnitudes, which is one.
        layers: Number of layers.
        errors: Per layer, the relative error of an approximation; empty if the file is exact.
        total_error: The relative error of all layers together, 0 if the file is exact.
        notes: What was broken in the source and how it was repaired, one line each.
        embeddings: The files that trained tokens went to, by token.
    """

    path: Path
    target: str
    layers: int
    errors: Mapping[str, float] = field(default_factory=dict)
    total_error: float = 0.0
    notes: tuple[str, ...] = ()
    embeddings: Mapping[str, Path] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest error, None if the file is exact."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def median_error(self) -> float:
        """Median of the layers' errors, 0 if the file is exact."""
        return statistics.median(self.errors.values()) if self.errors else 0.0


def convert_adapter(
    source: str | Path,
    output: str | Path,
    target: str,
    *,
    base: str | Path | None = None,
    family: str | None = None,
    rank: int = 64,
    alpha: float | None = None,
    tags: Sequence[str] = (),
    thumbnail: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Read an adapter in any known key format and write it for another program.

    Args:
        source: Adapter file or folder.
        output: File (``.safetensors``) or folder to write.
        target: A key of ``CONVERSIONS``.
        base: The base model (folder, hub id, ``embedded:NAME`` or single file). Needed by
            ``dense``, the approximations, and ``comfyui`` for magnitudes on the output axis;
            checks the adapter's fit in any case.
        family: Name of a `Family`, for files that do not say it.
        rank: Rank of an approximation.
        alpha: What it was trained with, for a file that lost it.
        tags: Words that adapter managers and web UIs show.
        thumbnail: An image that they show.
        dtype: Of the low-rank factors; None keeps float32.
        overwrite: Replace an output that exists.

    Raises:
        ExportError: If the output exists or is what is read, or the target is unknown or an
            approximation that needs a base.
        AdapterFormatError: If the source cannot be read, or the target cannot hold it or needs a
            base.
    """
    output, kind = Path(output).expanduser(), _APPROXIMATE.get(target, target)
    _check_request(target, base, rank)
    inputs = [find_adapter(source), *([Path(base).expanduser()] if base is not None else [])]
    _check_free(output, TARGETS[kind].file_name, inputs, overwrite)
    errors: dict[str, float] = {}
    total = 0.0
    with contextlib.ExitStack() as stack:
        model = None if base is None else stack.enter_context(open_model(base))
        sums = model is not None and target == "dense"
        adapter = read_adapter(source, model, alpha=alpha, sums=sums)
        embeddings = embeddings_beside(output, adapter)
        refuse_existing(embeddings.values(), overwrite)
        family = family or (model.family.name if model else "")
        metadata = _with_additions(adapter.metadata, family, tags, thumbnail)
        adapter = dataclasses.replace(adapter, metadata=metadata)
        if model is not None and target in _APPROXIMATE:
            adapter, errors, total = _approximated(adapter, model, rank)
        path = write_adapter(output, adapter, kind, dtype=dtype, base=model)
    # A comfyui file without output-axis magnitudes is a kohya one.
    if target == "comfyui" and not needs_compensation(adapter.layers):
        target = "kohya"
    notes = (*adapter.notes, *said_of_embeddings(embeddings))
    return ConversionReport(path, target, len(adapter.layers), errors, total, notes, embeddings)


def _check_request(target: str, base: str | Path | None, rank: int) -> None:
    if target not in CONVERSIONS:
        raise ExportError(f"unknown target {target!r}; there is {', '.join(CONVERSIONS)}")
    if rank < 1:
        raise ExportError(f"the rank of a plain LoRA must be at least 1, got {rank}")
    if base is None and target in _APPROXIMATE:
        raise ExportError(
            f"{target} files are made for one base model; give that model with --base"
        )


def _approximated(
    adapter: AdapterFile, model: ModelWeights, rank: int
) -> tuple[AdapterFile, dict[str, float], float]:
    """The adapter as a plain LoRA, the relative error of each layer, and that of all."""
    layers, errors, total = approximate(adapter.layers, partial(module_weight, model), rank)
    metadata = _approximation_of(adapter, rank, total)
    return dataclasses.replace(adapter, layers=layers, metadata=metadata), errors, total


def _approximation_of(adapter: AdapterFile, rank: int, error: float) -> AdapterMetadata:
    """The facts of a plain LoRA: what it approximates, and how far off it is at most."""
    extra = dict(adapter.metadata.extra)
    extra.pop(TRAINED_ALPHA, None)  # its own rank and alpha are those of the approximation
    is_dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    stated = stated_approximation(extra)
    before = stated.error or 0.0 if stated else 0.0
    extra |= {
        "approximation": f"singular values, rank {rank}",
        APPROXIMATES: extra.get(APPROXIMATES, "DoRA" if is_dora else "LoRA"),
        APPROXIMATION_ERROR: f"{before + error + before * error:.3g}",
    }
    return dataclasses.replace(adapter.metadata, extra=extra)


def _with_additions(
    old: AdapterMetadata, family: str, tags: Sequence[str], thumbnail: str | Path | None
) -> AdapterMetadata:
    """The metadata with what the user adds; the adapter's own family stays."""
    counts = dict(old.tag_frequency)
    return dataclasses.replace(
        old,
        family=old.family or family,
        tags=tuple(dict.fromkeys((*old.tags, *tags))),
        thumbnail=make_thumbnail(thumbnail) if thumbnail else old.thumbnail,
        tag_frequency=dict.fromkeys(tags, 1) | counts if counts else counts,
    )


def _check_free(
    output: Path, file_name: str | None, inputs: Sequence[Path], overwrite: bool
) -> None:
    """Refuse an output that exists, or would replace what it is made from."""
    if output.suffix in PICKLED:
        raise ExportError(f"{output.name}: pickles are not written; use the suffix .safetensors")
    file = output if output.suffix == ".safetensors" or file_name is None else output / file_name
    if not file.exists():
        return
    for path in inputs:
        # A PEFT folder may be that of one component, inside of the output.
        is_around = file.is_dir() and file.resolve() in path.resolve().parents
        if is_around or (path.exists() and file.samefile(path)):
            raise ExportError(f"{file} is or holds what is read for it; choose another name")
    refuse_existing([file], overwrite)
