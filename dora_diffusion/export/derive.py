"""Adapters that are fitted to a tuned model, or to the sum of several adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.config.base import AnyModel
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.export.convert import ConversionReport
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    check_adapter_output,
    model_name,
    open_model,
)
from dora_diffusion.export.fitting import (
    FitSettings,
    FitTarget,
    Fitted,
    axis_of,
    fit_layers,
    fit_to_adapters,
)
from dora_diffusion.export.merge_spec import Adapters, MergeSpec
from dora_diffusion.formats.adapter.embeddings import (
    EMBEDDINGS,
    Vectors,
    are_equal,
    embedding_notes,
)
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    READING,
    UNET_LAYERS,
    AdapterMetadata,
    agreed_reading,
    join_triggers,
    without_path,
)
from dora_diffusion.formats.checkpoint.models import StoredModel, comparable_shapes
from dora_diffusion.formats.checkpoint.schedule import schedule_facts
from dora_diffusion.formats.checkpoint.weights import module_shapes, module_weight
from dora_diffusion.formats.names.modules import known_layout

# Embedding tables of text encoders. Training changes the rows that captions look up, each in a
# different direction, so the change is not of low rank. Only two key formats can store tables.
_TABLES = (".token_embedding", ".position_embedding", ".embed_tokens")


def extract_adapter(
    base: AnyModel,
    tuned: AnyModel,
    output: str | PathLike[str],
    fit: FitSettings,
    *,
    key_format: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> ConversionReport:
    """Write the adapter of a given rank that is nearest to a tuned model.

    Every Linear and Conv2d of the UNet and the text encoders whose weight differs gets a layer.
    Tables of token vectors get none; a note lists the ones that differ.

    Args:
        base: The base of the adapter, as in `open_model`.
        tuned: The model to approximate, of the same architecture, as a folder or a file.
        output: File (``.safetensors``) or folder to write.
        fit: Settings of the fit, with a rank. Layers that are smaller get a smaller rank.
        key_format: One of ``KEY_FORMATS``. None: one that can store it.
        overwrite: Replace an existing file.
        on_progress: Called with (bytes of the base compared, total bytes).

    Returns:
        The report on the file, with the error of each layer: ``|W'' - W'| / |W' - W|``.

    Raises:
        ExportError: If the models have other architectures or equal weights, a setting is not
            valid, or the output exists.
        MergeError: If weights are quantised.
    """
    if fit.rank is None:
        raise ExportError("rank is None; give the largest rank of the layers")
    output = Path(output).expanduser()
    with open_model(base) as before, open_model(tuned) as after:
        kind = fit.key_format(key_format, before.family)
        inputs = [before.path, after.path]
        check_adapter_output(output, kind, AdapterFile({}), inputs, overwrite)
        fitted, notes = _fit_models(before, after, fit, on_progress)
        facts, base_metadata = after.metadata, _metadata_for(before)
        reading = {name: facts[OWN + name] for name in READING if OWN + name in facts}
        extra = {"extracted_from": model_name(after.path), **base_metadata.extra, **reading}
        extra = fitted.stated(extra, "tuned model", fit)
        metadata = dataclasses.replace(base_metadata, extra=extra)
        path = write_adapter(output, AdapterFile(fitted.layers, metadata), kind, base=before)
    return _report(path, kind, fitted, notes, {})


def combine_adapters(
    base: AnyModel,
    adapters: Adapters,
    output: str | PathLike[str],
    fit: FitSettings | None = None,
    *,
    key_format: str | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> ConversionReport:
    """Write one adapter with the effect of several, ``W' = W + sum_k s_k (W'_k - W)``.

    A layer of only one adapter, at strength 1, is copied bit for bit if its rank is small enough.
    Other layers are the nearest ones of a rank. They are exact if that is the sum of the ranks, and
    all magnitudes are on one axis.

    Args:
        base: The base of the adapters, as in `open_model`.
        adapters: ``[(adapter, strength), ...]``, or one adapter.
        output: File (``.safetensors``) or folder to write.
        fit: Settings of the fit. Without a rank, each layer gets the sum of the adapters' ranks.
        key_format: One of ``KEY_FORMATS``. None: one that can store it.
        alpha: Alpha of adapters whose files do not store it.
        overwrite: Replace an existing file.
        on_progress: Called with (bytes of the base's adapted weights done, total bytes).

    Raises:
        ExportError: If a setting is not valid, the output exists, or the sum is 0 in all layers.
        AdapterFormatError, MergeError: If an adapter cannot be read or does not fit the base.
    """
    fit = fit or FitSettings()
    spec, output = MergeSpec(adapters), Path(output).expanduser()
    spec.require_adapter()
    with open_model(base) as model:
        read = spec.read(model, alpha)
        spec.warn_of_assumptions()
        weighted = spec.weighted()
        axis = fit.norm_axis or axis_of(w for part in weighted for w in part.layers.values())
        fit = dataclasses.replace(fit, norm_axis=axis)
        kind = fit.key_format(key_format, model.family)
        inputs = [model.path, *spec.files()]
        adapter = AdapterFile({}, tokens=_tokens(read))
        embeddings = check_adapter_output(output, kind, adapter, inputs, overwrite)
        fitted = fit_to_adapters(model, weighted, fit, on_progress)
        metadata = _metadata_of_sum(model, spec, fitted, fit)
        adapter = AdapterFile(fitted.layers, metadata, tokens=adapter.tokens)
        path = write_adapter(output, adapter, kind, base=model)
    notes, left = [note for adapter in read for note in adapter.notes], fitted.unchanged
    lost = f"without effect at these strengths and left out of the result: {counted(left, 'layer')}"
    notes += [lost] if left else []
    return _report(path, kind, fitted, [*notes, *embedding_notes(path, embeddings)], embeddings)


def _report(
    path: Path, kind: str, fitted: Fitted, notes: Sequence[str], embeddings: dict[str, Path]
) -> ConversionReport:
    errors, total = fitted.errors, fitted.total_error
    return ConversionReport(path, kind, len(errors), errors, total, tuple(notes), embeddings)


def _fit_models(
    base: StoredModel, tuned: StoredModel, settings: FitSettings, on_progress: OnProgress | None
) -> tuple[Fitted, list[str]]:
    """Return the fitted layers, and notes on the other tensors."""
    _check_pair(base, tuned)
    # Adapters of some text encoders have no effect.
    is_refused = "train_text_encoder" in base.family.refused
    without = tuple(f"{name}." for name in base.family.text_encoder_names) if is_refused else ()
    shapes, _ = comparable_shapes(base, tuned)
    names = [n for n in shapes if not n.endswith(_TABLES) and not n.startswith(without)]

    def target_of(name: str) -> FitTarget | None:
        before, after = module_weight(base, name), module_weight(tuned, name)
        return FitTarget(before, after) if differ(before, after) else None

    fitted = fit_layers(base, names, target_of, settings, on_progress)
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


def _check_pair(base: StoredModel, tuned: StoredModel) -> None:
    """Check that two models have the same architecture.

    Raises:
        ExportError: If they have not.
    """
    if base.family != tuned.family:
        raise ExportError(
            f"the base is {base.family.title} ({base.family.name}), {tuned.path.name} is "
            f"{tuned.family.title} ({tuned.family.name}); both must be of the same family"
        )
    shapes, tuned_shapes = comparable_shapes(base, tuned)
    both = shapes.keys() & tuned_shapes.keys()
    wrong = [
        f"{name} {tuned_shapes[name]} for {shapes[name]}" if name in both else f"no {name}"
        for name in shapes
        if tuned_shapes.get(name) != shapes[name]
    ]
    wrong += [f"{name}, which the base lacks" for name in tuned_shapes.keys() - both]
    if wrong:
        raise ExportError(f"{tuned.path.name} is not a tuned {base.path.name}: {listing(wrong, 3)}")


def differ(base: Tensor, tuned: Tensor) -> bool:
    """Return whether two weights differ by more than rounding to each other's dtype."""
    return not (torch.equal(base.to(tuned.dtype), tuned) or torch.equal(base, tuned.to(base.dtype)))


def _notes_on_others(base: StoredModel, tuned: StoredModel, names: Sequence[str]) -> list[str]:
    """Return notes on differing tensors that no adapter can represent: biases, norms, the VAE."""
    held = {f"{name}.weight" for name in names}
    different = [
        name
        for name in base.specs.keys() & tuned.specs.keys() - held
        if base.specs[name].dtype.is_floating_point and differ(base[name], tuned[name])
    ]
    outside_vae = [name for name in different if not name.startswith("vae.")]
    notes = []
    if outside_vae:
        notes.append(
            f"{counted(len(outside_vae), 'other tensor')} differ, which no adapter can represent "
            f"(biases, norms, embeddings): {listing(outside_vae, 3)}"
        )
    if len(outside_vae) < len(different):
        notes.append(
            "the VAE differs, which no adapter can represent; a merged model can have it: "
            "'dora-diffusion export --base MODEL --adapter ADAPTER --vae TUNED --output MERGED'"
        )
    return notes


def _tokens(adapters: Sequence[AdapterFile]) -> dict[str, Vectors]:
    """Return the tokens that were trained with the adapters, unchanged by strengths.

    Raises:
        ExportError: If two adapters have different vectors for one token.
    """
    tokens: dict[str, Vectors] = {}
    for adapter in adapters:
        shared = tokens.keys() & adapter.tokens.keys()
        if twice := [t for t in shared if not are_equal(tokens[t], adapter.tokens[t])]:
            raise ExportError(
                f"two adapters have different vectors for {listing(twice)}, but a token can have "
                "only one: convert one of the adapters to diffusers, delete that token's file in "
                f"the folder {EMBEDDINGS} next to the result, and combine that"
            )
        tokens |= adapter.tokens
    return tokens


def _metadata_of_sum(
    model: StoredModel, spec: MergeSpec, fitted: Fitted, settings: FitSettings
) -> AdapterMetadata:
    """Return the metadata of a single adapter, or shared by several, and a list of the adapters.

    Raises:
        ExportError: If no layer was fitted.
    """
    if not fitted.layers:
        raise ExportError(
            "these adapters have no effect at these strengths: they are 0 or cancel each other; "
            "change a strength"
        )
    metadata, *rest = facts = [adapter.metadata for *_, adapter in spec.parts]
    if rest:
        metadata = _metadata_for(model)
        metadata = dataclasses.replace(
            metadata,
            trigger=join_triggers(fact.trigger for fact in facts),
            resolutions=tuple(sorted({side for fact in facts for side in fact.resolutions})),
            extra={**metadata.extra, **agreed_reading([fact.extra for fact in facts])},
            tags=tuple(dict.fromkeys(tag for fact in facts for tag in fact.tags)),
        )
    names = ((without_path(str(Path(path).resolve())), strength) for path, strength in spec.pairs)
    combined = ", ".join(f"{name}:{strength:g}" for name, strength in names)
    extra = {**metadata.extra, "combined": combined}
    if fitted.total_error:
        extra = fitted.stated(extra, "sum of the adapters", settings)
    return dataclasses.replace(metadata, extra=extra)


def _metadata_for(base: StoredModel) -> AdapterMetadata:
    """Return metadata on the base of an adapter: family, name, schedule, and layers of the UNet."""
    layout = known_layout(module_shapes(base))
    facts = {**schedule_facts(base.schedule()), UNET_LAYERS: layout.text() if layout else ""}
    extra = {name: text for name, text in facts.items() if text}
    return AdapterMetadata(base.family.name, model_name(base.path), extra=extra)
