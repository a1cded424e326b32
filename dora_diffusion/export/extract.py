"""The adapter that leads from one model to another, whatever training made the other one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.export.convert import ConversionReport, check_free
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    ProgressReporter,
    model_name,
    open_model,
)
from dora_diffusion.export.fit import FitSettings, FitTarget, Fitted, fit_layers
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    READING,
    UNET_LAYERS,
    AdapterMetadata,
)
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.schedule import schedule_facts
from dora_diffusion.formats.checkpoint.weights import module_shapes, module_weight
from dora_diffusion.formats.layouts.other import layout_named
from dora_diffusion.formats.names.modules import known_layout
from dora_diffusion.numerics.weights import NormAxis

# Of text encoders: tables of vectors. Training moves those that its captions look up, each its own
# way, which no low rank describes; and of the key formats only Diffusers' and PEFT's hold them.
_TABLES = (".token_embedding", ".position_embedding")


def extract_adapter(
    base: AnyModel,
    tuned: AnyModel,
    output: str | Path,
    *,
    rank: int,
    conv_rank: int | None = None,
    method: str = "dora",
    energy: float | None = None,
    norm_axis: NormAxis = "output",
    key_format: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> ConversionReport:
    """Write the adapter of a rank that is nearest to a tuned model.

    Every Linear and Conv2d of the UNet and the text encoders whose weight differs gets a layer;
    tables of token vectors are left out, and a note says where they differ.

    Args:
        base: The model that the adapter will be used with, as `open_model` takes it.
        tuned: The model to come near, of the same architecture; a folder or a file alike.
        output: File (``.safetensors``) or folder to write.
        rank: Largest rank; small layers get less.
        conv_rank: Largest rank of Conv2d layers; None: ``rank``.
        method: ``"dora"``, or ``"lora"``: without magnitudes.
        energy: Take each layer's smallest rank with this share of the squared singular values.
        norm_axis: Axis of the magnitudes.
        key_format: ``"diffusers"``, ``"peft"`` or ``"kohya"``. None: the one that can hold it.
        dtype: Of the low-rank factors; None: float32.
        overwrite: Replace a file that exists.
        on_progress: Called with (bytes of the base compared, bytes in all).

    Returns:
        What was written, with the error of each layer: ``|W'' - W'| / |W' - W|``.

    Raises:
        ExportError: If the models do not fit or differ, a setting cannot work, or it exists.
        MergeError: If weights are quantised.
    """
    settings = FitSettings(rank, conv_rank, energy, method, norm_axis, dtype)
    output, kind = Path(output).expanduser(), settings.key_format(key_format)
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(open_model(base))
        after = stack.enter_context(open_model(tuned))
        check_free(output, layout_named(kind).file_name, [before.path, after.path], overwrite)
        fitted, notes = _fit_models(before, after, settings, on_progress)
        adapter = AdapterFile(fitted.layers, _metadata(before, after, fitted, settings))
        path = write_adapter(output, adapter, kind, base=before)
    errors, total = fitted.errors, fitted.total_error
    return ConversionReport(path, kind, len(errors), errors, total, tuple(notes))


def _fit_models(
    base: StoredModel, tuned: StoredModel, settings: FitSettings, on_progress: OnProgress | None
) -> tuple[Fitted, list[str]]:
    """The layers, and what is to be said of the rest."""
    _check_pair(base, tuned)
    names = [name for name in module_shapes(base) if not name.endswith(_TABLES)]
    report = ProgressReporter(sum(_nbytes(base, name) for name in names), on_progress)

    def target_of(name: str) -> FitTarget | None:
        before, after = module_weight(base, name), module_weight(tuned, name)
        return FitTarget(before, after) if differ(before, after) else None

    fitted = fit_layers(names, target_of, settings, lambda n: report.step(_nbytes(base, n)))
    if not fitted.layers:
        raise ExportError(
            f"{tuned.path.name} has the weights of {base.path.name} in every layer; there is "
            "nothing to extract"
        )
    notes = []
    if fitted.unchanged:
        layers = counted(fitted.unchanged, "layer")
        notes.append(f"no adapter for {layers} without a difference")
    return fitted, notes + _notes_on_others(base, tuned, names)


def _nbytes(model: StoredModel, name: str) -> int:
    return model.specs[f"{name}.weight"].nbytes


def _check_pair(base: StoredModel, tuned: StoredModel) -> None:
    """Refuse models of two architectures.

    Raises:
        ExportError: If they are.
    """
    if base.family != tuned.family:
        raise ExportError(
            f"the base is {base.family.title} ({base.family.name}), {tuned.path.name} is "
            f"{tuned.family.title} ({tuned.family.name}); both must be of one family"
        )
    shapes, others = module_shapes(base), module_shapes(tuned)
    wrong = [
        f"{name} {tuple(others[name])} for {tuple(shape)}" if name in others else f"no {name}"
        for name, shape in shapes.items()
        if tuple(others.get(name, ())) != tuple(shape)
    ]
    wrong += [f"{name}, which the base lacks" for name in others.keys() - shapes.keys()]
    if wrong:
        raise ExportError(f"{tuned.path.name} is not a tuned {base.path.name}: {listing(wrong, 3)}")


def differ(base: Tensor, tuned: Tensor) -> bool:
    """Return whether two weights differ by more than rounding to the other's data type."""
    return not (torch.equal(base.to(tuned.dtype), tuned) or torch.equal(base, tuned.to(base.dtype)))


def _notes_on_others(base: StoredModel, tuned: StoredModel, names: Sequence[str]) -> list[str]:
    """A line on tensors that differ and that no adapter holds: biases, norms, tables, the VAE."""
    held = {f"{name}.weight" for name in names}
    different = [
        name
        for name in base.specs.keys() & tuned.specs.keys() - held
        if base.specs[name].dtype.is_floating_point and differ(base[name], tuned[name])
    ]
    in_vae = [name for name in different if name.startswith("vae.")]
    others = [name for name in different if not name.startswith("vae.")]
    notes = []
    if others:
        notes.append(
            f"{counted(len(others), 'other tensor')} differ, which no adapter can represent "
            f"(biases, norms, embeddings): {listing(others, 3)}"
        )
    if in_vae:
        notes.append("the VAE differs, which no adapter can represent: export --vae bakes it in")
    return notes


def _metadata(
    base: StoredModel, tuned: StoredModel, fitted: Fitted, settings: FitSettings
) -> AdapterMetadata:
    reading = {name: tuned.metadata[OWN + name] for name in READING if OWN + name in tuned.metadata}
    extra = {"extracted_from": model_name(tuned.path), **facts_of(base), **reading}
    return AdapterMetadata(
        family=base.family.name,
        base_model=model_name(base.path),
        extra=fitted.stated(extra, "tuned model", settings),
    )


def facts_of(base: StoredModel) -> dict[str, str]:
    """Metadata fields that an adapter for a base has."""
    layout = known_layout(module_shapes(base))
    facts = {
        **schedule_facts(base.schedule()),
        UNET_LAYERS: layout.text() if layout else "",
    }
    return {name: text for name, text in facts.items() if text}
