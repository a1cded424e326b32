"""One file in the original layout, from a diffusers folder or from another such file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.export.notes import MergeNotes
from dora_diffusion.export.output import (
    OnProgress,
    ProgressReporter,
    check_space,
)
from dora_diffusion.families import WEIGHT_COMPONENTS, Family
from dora_diffusion.formats.checkpoint.file import POSITIONS, CheckpointFile, standard_key
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.checkpoint.keys import (
    Entry,
    ModelFacts,
    entry_spec,
    marker_tensors,
    plan_checkpoint,
)
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.files.stream import TensorSpec, write_tensors


def write_folder_as_file(
    merged: MergedModel,
    pipeline: PipelineFolder,
    family: Family,
    output: Path,
    notes: MergeNotes,
    on_progress: OnProgress | None,
) -> None:
    """Write a pipeline folder's merged weights as one file in the original layout."""
    configs = {c: pipeline.config(c) for c in (*WEIGHT_COMPONENTS, "scheduler")}
    facts = ModelFacts.from_configs(family, {c: config for c, config in configs.items() if config})
    markers = marker_tensors(facts)
    entries = plan_checkpoint(facts, pipeline.specs)
    specs = {key: TensorSpec.of(tensor) for key, tensor in markers.items()}
    _write(merged, entries, specs, markers.__getitem__, output, notes, on_progress)


def write_file_as_file(
    merged: MergedModel,
    checkpoint: CheckpointFile,
    output: Path,
    notes: MergeNotes,
    on_progress: OnProgress | None,
) -> None:
    """Write a single-file checkpoint's merged weights in the same layout.

    Tensors of no component, such as the noise schedule, are copied as they are; the numbers of a
    text encoder's positions are written as integers.
    """
    entries = [replace(entry, key=standard_key(entry.key)) for entry in checkpoint.entries]
    copied = checkpoint.copied_specs()
    key_of = {standard_key(key): key for key in copied}
    specs = {
        key: TensorSpec(torch.int64, copied[old].shape) if key.endswith(POSITIONS) else copied[old]
        for key, old in key_of.items()
    }

    def load(key: str) -> Tensor:
        return checkpoint.reader[key_of[key]].to(specs[key].dtype)

    _write(merged, entries, specs, load, output, notes, on_progress)


def _write(
    merged: MergedModel,
    entries: list[Entry],
    other_specs: Mapping[str, TensorSpec],
    load_other: Callable[[str], Tensor],
    output: Path,
    notes: MergeNotes,
    on_progress: OnProgress | None,
) -> None:
    by_key = {entry.key: entry for entry in entries}
    sources = {name: merged.spec(name) for entry in entries for name in entry.sources}
    specs = {key: entry_spec(entry, sources) for key, entry in by_key.items()} | dict(other_specs)
    check_space(output, sum(spec.nbytes for spec in specs.values()))
    report = ProgressReporter(sum(spec.nbytes for spec in specs.values()), on_progress)

    def load(key: str) -> Tensor:
        return merged.build(by_key[key]) if key in by_key else load_other(key)

    with atomic_file(output) as temporary:
        write_tensors(temporary, specs, load, notes.draft(), notes.final, report.step)
        check_sample(temporary, entries, merged)
