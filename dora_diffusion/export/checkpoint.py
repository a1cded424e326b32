"""Write a model with adapters merged in: a diffusers folder, or one original-layout file.

Everything is streamed one tensor at a time, written beside the output, reopened and checked, and
only then renamed: an interrupted export leaves nothing behind and destroys nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dora_diffusion.export.folder import write_folder
from dora_diffusion.export.merged import Adapters, MergedModel, provenance, read_weighted
from dora_diffusion.export.output import ExportError, OnProgress, check_output
from dora_diffusion.export.single_file import write_file_as_file, write_folder_as_file
from dora_diffusion.formats.adapter_metadata import OWN
from dora_diffusion.formats.checkpoint_file import CheckpointFile
from dora_diffusion.formats.pipeline_folder import PipelineFolder
from dora_diffusion.formats.safetensors_stream import read_header
from dora_diffusion.merge import Strengths


def export_checkpoint(
    base: str | Path,
    adapters: Adapters,
    output: str | Path,
    *,
    strength: float = 1.0,
    direction_strength: float = 1.0,
    magnitude_strength: float = 1.0,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Merge adapters into a base model and write the result.

    Args:
        base: A diffusers folder, a hub id, ``embedded:NAME``, or a single ``.safetensors``
            checkpoint in the original layout (which exports to a single file only).
        adapters: An adapter file or output folder, or several as ``[(adapter, strength), ...]``,
            whose strengths are multiplied with ``strength``. Their order does not matter.
        output: A name ending in ``.safetensors`` gives one file in the original layout, which
            every user interface reads; any other name gives a diffusers folder.
        strength: 0 is the base, 1 the adapter as trained.
        direction_strength: Scales the low-rank difference inside the norm.
        magnitude_strength: Moves the magnitude by a share of its change.
        dtype: Of the UNet and the text encoders; None keeps that of the base. The VAE keeps its
            own: SDXL's overflows in half precision.
        variant: Weight variant of the base, such as ``"fp16"``.
        overwrite: Replace an output that exists.
        on_progress: Called with (tensors written, tensors in all).

    Returns:
        The output path.

    Raises:
        ExportError: If the output exists, or the written file fails its check.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        DiskFullError: If there is not enough space; nothing is changed then.
    """
    # Imported here: the model layer may import heavy libraries.
    from dora_diffusion.models.family import detect_checkpoint_family, detect_folder_family
    from dora_diffusion.models.locate import resolve_folder

    output = Path(output).expanduser()
    strengths = Strengths(strength, direction_strength, magnitude_strength)
    note = {"format": "pt", OWN + "merged": provenance(adapters, strength)}
    file = Path(base).expanduser()
    if file.suffix == ".safetensors" and file.is_file():
        _check_single(output, file, overwrite)
        family = detect_checkpoint_family(read_header(file).specs, file.name).name
        with CheckpointFile.open(file, family) as checkpoint:
            weighted = read_weighted(adapters, strengths, checkpoint.module_shapes())
            merged = MergedModel(checkpoint, weighted, dtype)
            write_file_as_file(merged, checkpoint, output, note, on_progress)
        return output
    folder = resolve_folder(base, variant=variant)
    check_output(output, folder, overwrite)
    with PipelineFolder.open(folder, variant) as pipeline:
        weighted = read_weighted(adapters, strengths, pipeline.module_shapes())
        merged = MergedModel(pipeline, weighted, dtype)
        if output.suffix == ".safetensors":
            family = detect_folder_family(folder).name
            write_folder_as_file(merged, pipeline, family, output, note, on_progress)
        else:
            write_folder(merged, pipeline, output, note, on_progress)
    return output


def _check_single(output: Path, file: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise ExportError(
            f"a diffusers folder cannot be made from the single file {file.name}, which lacks the "
            "configurations; give an output ending in .safetensors, or a diffusers folder as base"
        )
    check_output(output, file, overwrite)
