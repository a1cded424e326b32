"""Several adapters in one, or one with a smaller rank: fitted to what they make of a base."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from dora_diffusion.config.base import AnyModel
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.export.convert import ConversionReport, check_free
from dora_diffusion.export.extract import facts_of
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    check_overwrite,
    model_name,
    open_model,
)
from dora_diffusion.export.fit import FitSettings, Fitted, axis_of, fit_to_adapters
from dora_diffusion.export.merge_spec import Adapters, MergeSpec
from dora_diffusion.formats.adapter.embeddings import (
    EMBEDDINGS,
    Vectors,
    are_equal,
    embedding_notes,
)
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.adapter.metadata import (
    AdapterMetadata,
    agreed_reading,
    join_triggers,
    without_path,
)
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.layouts.other import layout_named
from dora_diffusion.numerics.weights import NormAxis


def combine_adapters(
    base: AnyModel,
    adapters: Adapters,
    output: str | Path,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    method: str = "dora",
    energy: float | None = None,
    norm_axis: NormAxis | None = None,
    key_format: str | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> ConversionReport:
    """Write one adapter that does what several do together, ``W' = W + sum_k s_k (W'_k - W)``.

    A layer that one adapter of strength 1 has alone is kept, bit for bit, if its rank is small
    enough. Others are the nearest of a rank: exact where that is the sum of theirs, on one axis.

    Args:
        base: The model that they are for, as `open_model` takes it.
        adapters: ``[(adapter, strength), ...]``, or one adapter.
        output: File (``.safetensors``) or folder to write.
        rank: Largest rank; None: the sum of the ranks in each layer.
        conv_rank: Largest rank of Conv2d layers; None: as ``rank``.
        method: ``"dora"``, or ``"lora"``: without magnitudes.
        energy: Take each layer's smallest rank with this share of the squared singular values.
        norm_axis: Of the magnitudes. None: the adapters' own, the output axis where they differ.
        key_format: ``"diffusers"``, ``"peft"`` or ``"kohya"``. None: the one that can hold it.
        alpha: What adapters were trained with whose files do not say it.
        dtype: Of the low-rank factors; None: float32.
        overwrite: Replace a file that exists.
        on_progress: Called with (bytes of the base's adapted weights done, bytes in all).

    Raises:
        ExportError: If a setting cannot work, the output exists, or nothing is left of the sum.
        AdapterFormatError, MergeError: If an adapter cannot be read or does not fit the base.
    """
    spec, output = MergeSpec(adapters), Path(output).expanduser()
    spec.require_adapter()
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(base))
        read = _read(spec, model, alpha)
        settings = FitSettings(rank, conv_rank, energy, method, norm_axis or _axis(read), dtype)
        kind = settings.key_format(key_format)
        inputs = [model.path, *(find_adapter(path) for path, _ in spec.pairs())]
        check_free(output, layout_named(kind).file_name, inputs, overwrite)
        adapter = AdapterFile({}, tokens=_tokens(read))
        embeddings = check_overwrite(output, adapter, overwrite)
        fitted = fit_to_adapters(model, spec.weighted(read), settings, on_progress)
        metadata = _metadata(model, spec, read, fitted, settings)
        adapter = AdapterFile(fitted.layers, metadata, tokens=adapter.tokens)
        path = write_adapter(output, adapter, kind, base=model)
    return _report(path, kind, fitted, read, embeddings)


def _report(
    path: Path,
    kind: str,
    fitted: Fitted,
    adapters: Sequence[AdapterFile],
    embeddings: dict[str, Path],
) -> ConversionReport:
    """Return the report, with repairs of the files, and the number of layers not in the result."""
    notes = [note for adapter in adapters for note in adapter.notes]
    if fitted.unchanged:
        layers = counted(fitted.unchanged, "layer")
        notes.append(f"nothing is left of {layers} at these strengths: the result lacks them")
    notes += embedding_notes(path, embeddings)
    errors, total = fitted.errors, fitted.total_error
    return ConversionReport(path, kind, len(errors), errors, total, tuple(notes), embeddings)


def _read(spec: MergeSpec, model: StoredModel, alpha: float | None) -> list[AdapterFile]:
    adapters = spec.read(model, alpha)
    for assumption in spec.assumptions(adapters):
        warnings.warn(f"{assumption}; if it was another, give --alpha", stacklevel=3)
    return adapters


def _tokens(adapters: Sequence[AdapterFile]) -> dict[str, Vectors]:
    """The tokens that were trained with the adapters, as trained, whatever their strengths.

    Raises:
        ExportError: If two adapters have one, and not with the same vectors.
    """
    tokens: dict[str, Vectors] = {}
    for adapter in adapters:
        shared = tokens.keys() & adapter.tokens.keys()
        if twice := [t for t in shared if not are_equal(tokens[t], adapter.tokens[t])]:
            raise ExportError(
                f"two adapters have vectors of their own for {listing(twice)}, and a token "
                "can have one: convert one of the adapters to diffusers, delete that token's file "
                f"in the folder {EMBEDDINGS} next to the result, and combine that"
            )
        tokens |= adapter.tokens
    return tokens


def _axis(adapters: Sequence[AdapterFile]) -> NormAxis:
    return axis_of(w for part in adapters for w in (*part.layers.values(), *part.beside.values()))


def _metadata(
    model: StoredModel,
    spec: MergeSpec,
    adapters: Sequence[AdapterFile],
    fitted: Fitted,
    settings: FitSettings,
) -> AdapterMetadata:
    """Return the metadata of the only adapter, or common to several; and what was combined.

    Raises:
        ExportError: If nothing was.
    """
    if not fitted.layers:
        raise ExportError(
            "nothing is left of these adapters at these strengths: they are 0, or cancel one "
            "another; change a strength"
        )
    parts = ", ".join(
        f"{without_path(str(Path(path).resolve()))}:{strength:g}" for path, strength in spec.pairs()
    )
    facts = [adapter.metadata for adapter in adapters]
    several = facts_of(model) | agreed_reading([fact.extra for fact in facts])
    extra = {**(facts[0].extra if len(facts) == 1 else several), "combined": parts}
    if fitted.total_error:
        extra = fitted.stated(extra, "sum of the adapters", settings)
    if len(facts) == 1:
        return dataclasses.replace(facts[0], extra=extra)
    return AdapterMetadata(
        family=model.family.name,
        base_model=model_name(model.path),
        trigger=join_triggers(fact.trigger for fact in facts),
        resolutions=tuple(sorted({side for fact in facts for side in fact.resolutions})),
        extra=extra,
        tags=tuple(dict.fromkeys(tag for fact in facts for tag in fact.tags)),
    )
