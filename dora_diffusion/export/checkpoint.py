"""Write a model, merged or trained: a Diffusers folder, or one file in the original layout.

Everything is streamed one tensor at a time, written beside the output, reopened and checked, and
only then renamed: an interrupted export leaves nothing behind and destroys nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    ProgressReporter,
    check_output,
    check_space,
    open_model,
    refuse_existing,
)
from dora_diffusion.export.folder import plan_folder, write_folder
from dora_diffusion.export.merge_spec import Adapters, MergeSpec
from dora_diffusion.export.merged import (
    MergedModel,
    Overlay,
    VaeFile,
    check_sample,
    open_vae,
    with_vae,
)
from dora_diffusion.export.metadata import ModelMetadata, merged_metadata, trained_metadata
from dora_diffusion.export.programs import check_a1111_config, write_a1111_config
from dora_diffusion.formats.adapter.embeddings import (
    embedding_notes,
    is_written,
    write_embeddings,
)
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, without_path
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.weights import ModelWeights, SingleFile
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.files.stream import write_tensors
from dora_diffusion.numerics.weights import MergeStrengths


def export_checkpoint(
    base: AnyModel,
    adapters: Adapters,
    output: str | Path,
    *,
    strength: float | MergeStrengths = 1.0,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Merge adapters into a base model and write the result.

    Tokens that were trained with an adapter are not part of a model of the base's vocabulary: they
    go to textual-inversion files, in a folder ``embeddings`` beside a single file or inside of a
    folder.

    Args:
        base: A diffusers folder, a hub id, ``embedded:NAME``, or a single ``.safetensors``
            checkpoint in the original layout; or one of these as a `BaseModel`, whose ``vae`` is
            baked in, and whose ``model_config`` is that of a folder made from a single file.
        adapters: An adapter file or output folder, or several as ``[(adapter, strength), ...]``,
            whose strengths are multiplied with ``strength``. Their order does not matter. Of none
            (``()``) the output is the base itself, in this layout and dtype.
        output: A name ending in ``.safetensors`` gives one file in the original layout, with a
            YAML beside it where A1111 needs one (`inspect_model` says what each program takes it
            for); any other name gives a diffusers folder.
        strength: 0 is the base, 1 the adapter as trained; or all of its `MergeStrengths`.
        alpha: What adapters were trained with whose files do not say it; None takes their rank,
            with a warning.
        dtype: Of the UNet and the text encoders; None keeps that of the base. The VAE keeps its
            own: SDXL's overflows in half precision.
        overwrite: Replace an output that exists.
        on_progress: Called with (bytes written, bytes in all).

    Returns:
        The output path.

    Raises:
        ExportError: If the output exists, or the written file fails its check.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        DiskFullError: If there is not enough space; nothing is changed then.

    Warns:
        UserWarning: Of an alpha that was assumed, and of the files that tokens went to.
    """
    output, base = Path(output).expanduser(), BaseModel.of(base)
    spec = MergeSpec(adapters, MergeStrengths.of(strength))
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(base))
        inputs = [find_adapter(path) for path, _ in spec.pairs()]
        if base.vae is not None:
            inputs.append(Path(base.vae).expanduser())
        check_output(output, model.path, inputs, overwrite)
        new_vae = stack.enter_context(open_vae(base.vae)) if base.vae else None
        weights: ModelWeights = with_vae(model, new_vae) if new_vae else model
        read = spec.read(weights, alpha)
        for assumption in spec.assumptions(read):
            warnings.warn(f"{assumption}; if it was another, give --alpha", stacklevel=2)
        model.restate_schedule(base, [adapter.metadata for adapter in read])
        words = spec.embeddings(read, model.path, output)
        refuse_existing((word[0] for word in words if not is_written(*word)), overwrite)
        merged = MergedModel(weights, spec.weighted(read), dtype)
        files = [(token, file) for file, token, _ in words]
        metadata = merged_metadata(model, spec, read, output, files, base)
        stack.callback(metadata.close)
        _write(merged, model, output, metadata, base.model_config, new_vae, on_progress)
        for file, token, vectors in words:
            write_embeddings({token: file}, {token: vectors})
    for note in embedding_notes(output, dict(files)):
        warnings.warn(f"{output.name}: {note}", stacklevel=2)
    return output


def export_trained(
    base: BaseModel,
    tensors: Mapping[str, Callable[[], Tensor]],
    output: str | Path,
    metadata: AdapterMetadata,
    *,
    words: Mapping[str, Path] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model that was trained from a base, streamed one tensor at a time, atomically.

    Args:
        base: What it was trained from. What was not trained is its own, to the last bit.
        tensors: Canonical name -> what gives the trained tensor.
        output: A name ending in ``.safetensors`` gives one file in the original layout, any other
            a Diffusers folder. What is there is replaced.
        metadata: What is known of the training: trigger words, steps.
        words: The files of its trained words, which its file and card name.
        dtype: Of the UNet and the text encoders; None keeps that of the base.

    Returns:
        The output path.

    Raises:
        ExportError: If the output is not a model, or the base has no such tensor.
        DiskFullError: If there is not enough space; nothing is changed then.
    """
    output = Path(output).expanduser()
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(base))
        check_output(output, model.path, (), True)
        new_vae = stack.enter_context(open_vae(base.vae)) if base.vae else None
        weights: ModelWeights = with_vae(model, new_vae) if new_vae else model
        if unknown := tensors.keys() - weights.specs.keys():
            raise ExportError(f"the base has no {listing(sorted(unknown), 3)}")
        trained = MergedModel(Overlay(weights, tensors), (), dtype)
        facts = replace(metadata, base_model=without_path(str(base.path)))
        model.restate_schedule(base, [facts])
        described = trained_metadata(model, metadata, output, words or {})
        stack.callback(described.close)
        _write(trained, model, output, described, base.model_config, new_vae, None)
    return output


def _write(
    merged: MergedModel,
    model: StoredModel,
    output: Path,
    metadata: ModelMetadata,
    config: str | Path | None,
    vae: VaeFile | None,
    on_progress: OnProgress | None,
) -> None:
    if output.suffix == ".safetensors":
        check_a1111_config(output, model)
        _write_single_file(merged, model.single_file(), output, metadata, on_progress)
        write_a1111_config(output, model)
        return
    plan = plan_folder(model, config)
    if vae is not None:
        plan = plan.with_tensors("vae", vae.specs)
    write_folder(merged, plan, output, metadata, on_progress, vae.config if vae else None)


def _write_single_file(
    merged: MergedModel,
    layout: SingleFile,
    output: Path,
    metadata: ModelMetadata,
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
        write_tensors(temporary, specs, load, metadata.draft(), metadata.final, report.step)
        check_sample(temporary, layout.entries, merged)
