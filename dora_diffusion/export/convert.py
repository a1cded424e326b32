"""Convert adapters between programs' formats."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.config.base import AnyModel
from dora_diffusion.export.files import ExportError, check_adapter_output, open_model
from dora_diffusion.export.fitting import FitSettings, axis_of, key_format_for
from dora_diffusion.formats.adapter.embeddings import embedding_notes
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.adapter.inspect import stated_error
from dora_diffusion.formats.adapter.metadata import APPROXIMATES, STRENGTH
from dora_diffusion.formats.adapter.stored import StoredAdapter, find_adapter
from dora_diffusion.formats.checkpoint.weights import module_weight
from dora_diffusion.formats.layouts import (
    CONVERSIONS,
    LORA_RANK,
    NOT_TARGETS,
    PROGRAMS,
    TARGETS,
    input_format,
)
from dora_diffusion.formats.layouts.kohya import needs_compensation
from dora_diffusion.formats.layouts.layout import (
    denoiser_of,
    denoisers_of,
    norm_axes,
    refuse_denoiser,
)
from dora_diffusion.numerics.dora import at_strength
from dora_diffusion.numerics.weights import LayerWeights, require_strength

if TYPE_CHECKING:
    from dora_diffusion.formats.checkpoint.models import StoredModel

_OF_THE_UPDATE = (
    "the magnitudes are unchanged, and the error is that of the low-rank update; with --base the "
    "nearest DoRA is fitted"
)


@dataclass(frozen=True)
class ConversionReport:
    """Report on a conversion.

    Attributes:
        path: The file or folder.
        target: The format, a key of ``CONVERSIONS``; for a program the format that it needs.
            ``"kohya"`` for ``comfyui`` and ``comfyui_pair`` without output-axis magnitudes, since
            one such file is exact in every version.
        layers: Number of layers.
        errors: Relative error of each fitted layer; empty if no layer is fitted.
        total_error: Relative error of all layers together; 0 if the file is exact.
        notes: Repairs of the source, one line each.
        embeddings: Files of the trained tokens, by token.
        program: Target program, a key of ``PROGRAMS``; empty if the target is a format.
        growth: Size of the file relative to its source.
    """

    path: Path
    target: str
    layers: int
    errors: Mapping[str, float] = field(default_factory=dict)
    total_error: float = 0.0
    notes: tuple[str, ...] = ()
    embeddings: Mapping[str, Path] = field(default_factory=dict)
    program: str = ""
    growth: float = 1.0

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest error; None if the file is exact."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def median_error(self) -> float:
        """Median of the layers' errors; 0 if the file is exact."""
        return statistics.median(self.errors.values()) if self.errors else 0.0


def convert_adapter(  # noqa: PLR0913 - keywords, each documented
    source: str | PathLike[str],
    output: str | PathLike[str],
    target: str,
    fit: FitSettings | None = None,
    *,
    base: AnyModel | None = None,
    family: str | None = None,
    alpha: float | None = None,
    strength: float = 1.0,
    tags: Sequence[str] = (),
    thumbnail: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Read an adapter in any known key format and write it for another program.

    Args:
        source: Adapter file or folder.
        output: File (``.safetensors``) or folder to write.
        target: A program, a key of ``PROGRAMS``, or a format, a key of ``CONVERSIONS``.
        fit: Ranks for ``smaller-rank`` and ``lora`` (default: ``LORA_RANK``), and the dtype of the
            low-rank factors. The adapter's method and axis are kept.
        base: The base model. ``dense``, ``lora`` and ``comfyui`` (output axis) require it;
            ``smaller-rank`` has a smaller error with it.
        family: Name of a `Family`, for files that do not store it.
        alpha: Alpha of training, for a file without it.
        strength: Strength of the written adapter, ``W + strength * (W' - W)``. A DoRA requires the
            base. Trained tokens are unchanged.
        tags: Tags for adapter managers and web UIs.
        thumbnail: An image for adapter managers and web UIs.
        overwrite: Replace an existing output.

    Raises:
        ExportError: If the output exists or is an input, or the target lacks a base or a rank.
        AdapterFormatError: If the source cannot be read, or the target cannot store it.
        MergeError: If no adapter has this strength.
    """
    fit = fit or FitSettings()
    _check_arguments(target, fit, strength)
    source, output = find_adapter(Path(source)), Path(output).expanduser()
    with contextlib.nullcontext() if base is None else open_model(base) as model:
        inputs = [source, model.path] if model else [source]
        adapter = _read(source, target, model, alpha)
        program, target = target if target in PROGRAMS else "", conversion_of(target, adapter)
        fit = dataclasses.replace(fit, norm_axis=axis_of(adapter.layers.values()))
        fit = _check_request(target, program, model, fit, adapter.metadata.base_model)
        _check_strength(strength, adapter, model)
        kind = _layout_to_write(target, adapter, fit, model)
        embeddings = check_adapter_output(output, kind, adapter, inputs, overwrite)
        family = family or (model.family.name if model else "")
        adapter = _with_additions(adapter, family, tags, thumbnail)
        adapter = _at_strength(adapter, strength, model)
        adapter, errors, total = _of_smaller_rank(adapter, target, fit, model)
        path = write_adapter(output, adapter, kind, dtype=fit.dtype, base=model)
    if target in ("comfyui", "comfyui_pair") and not needs_compensation(adapter.layers):
        target = input_format(denoiser_of(adapter.layers))
    count = len(adapter.layers)
    notes = (*adapter.notes, *embedding_notes(path, embeddings, program))
    growth = StoredAdapter.open(path).nbytes / StoredAdapter.open(source).nbytes
    return ConversionReport(path, target, count, errors, total, notes, embeddings, program, growth)


def _check_arguments(target: str, fit: FitSettings, strength: float) -> None:
    require_strength("strength", strength)
    if strength <= 0:
        raise ExportError(f"strength is {strength:g}; it must be greater than 0")
    if target not in TARGETS:
        reason = NOT_TARGETS.get(target.lower(), f"there is {', '.join(TARGETS)}")
        raise ExportError(f"unknown target {target!r}; {reason}")
    if fit.method != "dora" or fit.norm_axis is not None:
        raise ExportError(
            f"fit is {fit}; convert keeps the adapter's method and norm axis, so give neither"
        )


def _read(
    source: str | Path, target: str, model: StoredModel | None, alpha: float | None
) -> AdapterFile:
    """Read an adapter for a target; a LoRA added to a DoRA is read if the target can store both."""
    program = PROGRAMS.get(target)
    sums = target in ("dense", "smaller-rank") or (program is not None and program.takes_dense)
    return read_adapter(source, model, alpha=alpha, sums=sums and model is not None)


def conversion_of(target: str, adapter: AdapterFile) -> str:
    """Return the conversion of an adapter for a program; other targets are returned unchanged.

    Raises:
        AdapterFormatError: If there is none for the adapter's denoiser.
    """
    denoisers = denoisers_of(adapter.layers)
    if target not in PROGRAMS:
        refuse_denoiser(target, CONVERSIONS[target].denoisers, denoisers)
        return target
    program = PROGRAMS[target]
    refuse_denoiser(program.title, program.denoisers, denoisers)
    axes = norm_axes(adapter.layers.values())
    return program.conversion(axes, is_sum=bool(adapter.beside), denoisers=denoisers)


def _check_request(
    target: str, program: str, model: StoredModel | None, settings: FitSettings, trained_on: str
) -> FitSettings:
    """Check the request. Returns the settings with the ranks that the target supports.

    Warns:
        UserWarning: If limits on ranks have no effect.
    """
    conversion = CONVERSIONS[target]
    if model is None and conversion.for_one_base and (conversion.plain_lora_in or program):
        files = f"{target} files are"
        if program:
            files = f"{PROGRAMS[program].title} needs this adapter as a {target} file, which is"
        ways = ", or write comfyui_pair for any base" * (target == "comfyui")
        raise ExportError(
            f"{files} made for one base model; give that model with --base"
            + _trained_on(trained_on)
            + ways
        )
    limits, reason = list(settings.limits), ""
    if not conversion.takes_rank:
        reason = f"{target} files keep the adapter's; --to smaller-rank and --to lora change it"
    elif conversion.plain_lora_in:
        limits, reason = [n for n in limits if n == "conv_rank"], f"{target} files have one rank"
    for name in limits if reason else ():
        warnings.warn(f"{name} has no effect because {reason}", stacklevel=3)
    if conversion.plain_lora_in:
        rank = settings.rank or LORA_RANK
        return dataclasses.replace(settings, rank=rank, conv_rank=None)
    if conversion.needs_rank and not settings.limits:
        raise ExportError(f"{target} needs a rank: give --rank, --conv_rank or --energy")
    return settings


def _check_strength(strength: float, adapter: AdapterFile, model: StoredModel | None) -> None:
    if strength != 1 and model is None and norm_axes(adapter.layers.values()):
        raise ExportError(
            f"strength {strength:g} of a DoRA depends on the base's weights; give that model "
            "with --base" + _trained_on(adapter.metadata.base_model)
        )


def _trained_on(base: str) -> str:
    return f" (it was trained on {base})" if base else ""


def _layout_to_write(
    target: str, adapter: AdapterFile, fit: FitSettings, model: StoredModel | None
) -> str:
    conversion = CONVERSIONS[target]
    if not conversion.needs_rank:
        return conversion.plain_lora_in or target
    return fit.key_format(None, model.family) if model else key_format_for(adapter.layers)


def _at_strength(adapter: AdapterFile, strength: float, model: StoredModel | None) -> AdapterFile:
    """Return the adapter whose full effect is that of an adapter at a strength."""
    if strength == 1:
        return adapter

    def scaled(name: str, layer: LayerWeights) -> LayerWeights:
        if layer.magnitude is None or model is None:
            return dataclasses.replace(layer, alpha=strength * layer.alpha)
        return at_strength(module_weight(model, name), layer, strength)

    layers, beside = (
        {name: scaled(name, layer) for name, layer in part.items()}
        for part in (adapter.layers, adapter.beside)
    )
    total = strength * float(adapter.metadata.extra.get(STRENGTH, 1))
    metadata = dataclasses.replace(
        adapter.metadata, extra={**adapter.metadata.extra, STRENGTH: f"{total:g}"}
    )
    notes = adapter.notes
    if adapter.tokens:
        notes += (f"strength {strength:g} does not change its trained words",)
    return dataclasses.replace(
        adapter, layers=layers, beside=beside, metadata=metadata, notes=notes
    )


def _of_smaller_rank(
    adapter: AdapterFile, target: str, settings: FitSettings, model: StoredModel | None
) -> tuple[AdapterFile, Mapping[str, float], float]:
    """Return the adapter with fitted layers, the error of each, and the total error."""
    conversion, notes, extra = CONVERSIONS[target], adapter.notes, adapter.metadata.extra
    if not conversion.takes_rank:
        return adapter, {}, 0.0
    from dora_diffusion.export.fitting import decomposed, fit_to_adapters

    if model is None or conversion.plain_lora_in:
        fitted = decomposed(adapter.layers, settings, model)
        how = f"singular values{'' if model else ' of the update'}, {settings.ranks}"
    else:
        from dora_diffusion.numerics.merging import WeightedAdapter

        weighted = [WeightedAdapter(adapter.layers), WeightedAdapter(adapter.beside)]
        fitted, how = fit_to_adapters(model, weighted, settings), str(settings)
    is_dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    if model is None and fitted.total_error and is_dora:
        notes += (_OF_THE_UPDATE,)
    if conversion.plain_lora_in or fitted.total_error:
        of = ("" if conversion.plain_lora_in else "original ") + ("DoRA" if is_dora else "LoRA")
        before = stated_error(extra) or 0.0
        extra = fitted.stated(extra, extra.get(APPROXIMATES, of), how, before)
    metadata = dataclasses.replace(adapter.metadata, extra=extra)
    adapter = AdapterFile(fitted.layers, metadata, notes, tokens=adapter.tokens)
    return adapter, fitted.errors, fitted.total_error


def _with_additions(
    adapter: AdapterFile, family: str, tags: Sequence[str], thumbnail: str | PathLike[str] | None
) -> AdapterFile:
    """Return the adapter with the user's additions to its metadata; a stored family is kept."""
    old, image = adapter.metadata, adapter.metadata.thumbnail
    if thumbnail:
        from dora_diffusion.sampling.images import thumbnail as make_thumbnail

        image = make_thumbnail(fspath(thumbnail))
    counts = dict(old.tag_frequency)
    metadata = dataclasses.replace(
        old,
        family=old.family or family,
        tags=tuple(dict.fromkeys((*old.tags, *tags))),
        thumbnail=image,
        tag_frequency=dict.fromkeys(tags, 1) | counts if counts else counts,
    )
    return dataclasses.replace(adapter, metadata=metadata)
