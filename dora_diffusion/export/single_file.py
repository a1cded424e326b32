"""One file in the original layout, from a Diffusers folder or from another such file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.export.notes import Notes
from dora_diffusion.export.output import OnProgress, ProgressReporter, check_space
from dora_diffusion.formats.checkpoint.weights import SingleFile
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.files.stream import write_tensors


def write_single_file(
    merged: MergedModel,
    layout: SingleFile,
    output: Path,
    notes: Notes,
    on_progress: OnProgress | None,
) -> None:
    """Write the merged weights as one file, atomically, and check it."""
    entries = {entry.key: entry for entry in layout.entries}
    specs = {key: entry.spec(merged.specs) for key, entry in entries.items()}
    specs |= layout.other_specs
    total = sum(spec.nbytes for spec in specs.values())
    check_space(output, total)
    report = ProgressReporter(total, on_progress)

    def load(key: str) -> Tensor:
        return merged.build(entries[key]) if key in entries else layout.load_other(key)

    with atomic_file(output) as temporary:
        write_tensors(temporary, specs, load, notes.draft(), notes.final, report.step)
        check_sample(temporary, layout.entries, merged)
