"""Convert adapters between programs' formats."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.export.files import ExportError, check_overwrite, open_model, refuse_existing
from dora_diffusion.export.fit import (
    FitSettings,
    Fitted,
    axis_of,
    fit_to_adapters,
    key_format_for,
    truncate_layers,
)
from dora_diffusion.formats.adapter.embeddings import embedding_notes
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from dora_diffusion.formats.adapter.metadata import (
    APPROXIMATES,
    APPROXIMATION_ERROR,
    TRAINED_ALPHA,
    AdapterMetadata,
)
from dora_diffusion.formats.adapter.stored import StoredAdapter, find_adapter
from dora_diffusion.formats.checkpoint.models import StoredModel
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_weight
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.formats.files.stream import PICKLED
from dora_diffusion.formats.layouts import CONVERSIONS, LORA_RANK, PROGRAMS, TARGETS, Program
from dora_diffusion.formats.layouts.kohya import needs_compensation
from dora_diffusion.formats.layouts.layout import stated_approximation
from dora_diffusion.formats.layouts.other import layout_named
from dora_diffusion.numerics.low_rank import approximate
from dora_diffusion.numerics.merging import WeightedAdapter
from dora_diffusion.sampling.images import thumbnail as make_thumbnail

# Plain-LoRA approximations, and the format that each is written in.
_APPROXIMATE = {
    name: conversion.plain_lora_in
    for name, conversion in CONVERSIONS.items()
    if conversion.plain_lora_in
}

_OF_THE_UPDATE = (
    "the magnitudes stay and the error is that of the low-rank update; with --base the nearest "
    "DoRA is found"
)


@dataclass(frozen=True)
class ConversionReport:
    """Report on a conversion.

    Attributes:
        path: The file or folder.
        target: The format, a key of ``CONVERSIONS``: of a program the one that it needs.
            ``"kohya"`` for a ``comfyui`` file without output-axis magnitudes, which is one.
        layers: Number of layers.
        errors: Per layer, the relative error of what was fitted; empty where nothing is.
        total_error: The relative error of all layers together, 0 if the file is exact.
        notes: What was broken in the source and how it was repaired, one line each.
        embeddings: The files that trained tokens went to, by token.
        program: The key of ``PROGRAMS`` that it was made for; empty where a format was asked for.
        growth: Size of the file, relative to what it was made from.
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
    base: AnyModel | None = None,
    family: str | None = None,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
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
        target: A key of ``PROGRAMS``, which gets the format that it needs, or of ``CONVERSIONS``.
        base: Of ``dense``, ``lora``, ``comfyui`` on the output axis; ``dora`` is nearer with it.
        family: Name of a `Family`, for files that do not say it.
        rank: Largest rank, of ``dora`` and ``lora``; None: ``LORA_RANK`` for ``lora``.
        conv_rank: Largest rank of Conv2d layers, of ``dora``; None: ``rank``.
        energy: Take each layer's smallest rank with this share of the squared singular values.
        alpha: What it was trained with, for a file that lost it.
        tags: Words that adapter managers and web UIs show.
        thumbnail: An image that they show.
        dtype: Of the low-rank factors; None keeps float32.
        overwrite: Replace an output that exists.

    Raises:
        ExportError: If the output exists or is read, or the target lacks a base or a rank.
        AdapterFormatError: If the source cannot be read, or the target cannot hold it.
    """
    output, inputs = Path(output).expanduser(), [find_adapter(source)]
    inputs += [Path(BaseModel.of(base).path).expanduser()] if base is not None else []
    with contextlib.ExitStack() as stack:
        model = None if base is None else stack.enter_context(open_model(base))
        adapter = _read(source, target, model, alpha)
        program, target = target if target in PROGRAMS else "", conversion_of(target, adapter)
        settings = FitSettings(rank, conv_rank, energy, dtype=dtype)
        trained_on = adapter.metadata.base_model
        settings = _check_request(target, base, settings, PROGRAMS.get(program), trained_on)
        settings = dataclasses.replace(settings, norm_axis=axis_of(adapter.layers.values()))
        kind = _key_format(target, adapter, settings, model)
        check_free(output, layout_named(kind).file_name, inputs, overwrite)
        embeddings = check_overwrite(output, adapter, overwrite)
        adapter = _with_additions(adapter, family or _family(model), tags, thumbnail)
        adapter, errors, total = _of_smaller_rank(adapter, target, settings, model)
        path = write_adapter(output, adapter, kind, dtype=dtype, base=model)
    count, written = len(adapter.layers), _written_as(target, adapter)
    notes = (*adapter.notes, *embedding_notes(path, embeddings, program))
    growth = StoredAdapter.open(path).nbytes / StoredAdapter.open(source).nbytes
    return ConversionReport(path, written, count, errors, total, notes, embeddings, program, growth)


def _read(
    source: str | Path, target: str, model: ModelWeights | None, alpha: float | None
) -> AdapterFile:
    """An adapter for a target; with a LoRA beside its DoRA where that can hold it."""
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}; there is {', '.join(TARGETS)}")
    program = PROGRAMS.get(target)
    sums = target in ("dense", "dora") or (program is not None and program.takes_dense)
    return read_adapter(source, model, alpha=alpha, sums=sums and model is not None)


def conversion_of(target: str, adapter: AdapterFile) -> str:
    """The conversion that a program needs of an adapter; any other target stays."""
    if target not in PROGRAMS:
        return target
    axes = {w.norm_axis for w in adapter.layers.values() if w.magnitude is not None}
    return PROGRAMS[target].conversion(axes, is_sum=bool(adapter.beside))


def _check_request(
    target: str,
    base: AnyModel | None,
    settings: FitSettings,
    program: Program | None,
    trained_on: str,
) -> FitSettings:
    """Refuse what cannot be done; the settings with the rank that a target has by default.

    Warns:
        UserWarning: Of limits on ranks without effect.
    """
    is_needed = target in _APPROXIMATE or (program and CONVERSIONS[target].for_one_base)
    if base is None and is_needed:
        files = f"{target} files are"
        if program is not None:
            files = f"{program.title} needs this adapter as a {target} file, which is"
        raise ExportError(
            f"{files} made for one base model; give that model with --base"
            + (f" (it was trained on {trained_on})" if trained_on else "")
        )
    limits = {name: getattr(settings, name) for name in ("rank", "conv_rank", "energy")}
    given, reason = [name for name, value in limits.items() if value is not None], ""
    if not CONVERSIONS[target].takes_rank:
        reason = f"{target} files keep the adapter's; --to dora and --to lora take one"
    elif target in _APPROXIMATE:
        given, reason = [n for n in given if n == "conv_rank"], f"{target} files have one rank"
    for name in given if reason else ():
        warnings.warn(f"{name} has no effect because {reason}", stacklevel=3)
    if target in _APPROXIMATE and settings.rank is None:
        return dataclasses.replace(settings, rank=LORA_RANK)
    if CONVERSIONS[target].needs_rank and not settings.limits:
        raise ExportError(f"{target} needs a smaller rank: give --rank, --conv_rank or --energy")
    return settings


def _written_as(target: str, adapter: AdapterFile) -> str:
    """A comfyui file without output-axis magnitudes is a kohya one."""
    plain = target == "comfyui" and not needs_compensation(adapter.layers)
    return "kohya" if plain else target


def _key_format(
    target: str, adapter: AdapterFile, settings: FitSettings, model: ModelWeights | None
) -> str:
    """The layout that a target is written in."""
    if not CONVERSIONS[target].needs_rank:
        return _APPROXIMATE.get(target, target)
    return settings.key_format(None) if model else key_format_for(adapter.layers)


def _of_smaller_rank(
    adapter: AdapterFile, target: str, settings: FitSettings, model: ModelWeights | None
) -> tuple[AdapterFile, Mapping[str, float], float]:
    """The adapter with other layers, the error of each, and that of all together."""
    if not CONVERSIONS[target].takes_rank:
        return adapter, {}, 0.0
    original, notes = "", adapter.notes
    if target in _APPROXIMATE and model is not None and settings.rank is not None:
        weight_of = partial(module_weight, model)
        rank, energy = settings.rank, settings.energy
        layers, errors, total = approximate(adapter.layers, weight_of, rank, energy)
        how = f"singular values, rank {rank}" + ("" if energy is None else f", energy {energy:g}")
    else:
        fitted, how, original = _resized(adapter, settings, model), str(settings), "original "
        layers, errors, total = fitted.layers, fitted.errors, fitted.total_error
        if model is None:
            how = f"singular values of the update, {settings.ranks}"
        if model is None and total and any(w.magnitude is not None for w in layers.values()):
            notes += (_OF_THE_UPDATE,)
    is_exact = original and not total
    metadata = adapter.metadata if is_exact else _approximation_of(adapter, how, original, total)
    adapter = dataclasses.replace(adapter, layers=layers, beside={}, metadata=metadata, notes=notes)
    return adapter, errors, total


def _resized(adapter: AdapterFile, settings: FitSettings, model: ModelWeights | None) -> Fitted:
    if model is None:
        return truncate_layers(adapter.layers, settings)
    parts = [WeightedAdapter(adapter.layers), WeightedAdapter(adapter.beside)]
    return fit_to_adapters(model, parts, settings)


def _approximation_of(
    adapter: AdapterFile, how: str, original: str, error: float
) -> AdapterMetadata:
    """The facts of an approximation: of what, how, and how far off it is at most."""
    extra = dict(adapter.metadata.extra)
    extra.pop(TRAINED_ALPHA, None)  # its own rank and alpha are those of the approximation
    is_dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    stated = stated_approximation(extra)
    before = stated.error or 0.0 if stated else 0.0
    extra |= {
        "approximation": how,
        APPROXIMATES: extra.get(APPROXIMATES, original + ("DoRA" if is_dora else "LoRA")),
        APPROXIMATION_ERROR: f"{before + error + before * error:.3g}",
    }
    return dataclasses.replace(adapter.metadata, extra=extra)


def _family(model: StoredModel | None) -> str:
    return "" if model is None else model.family.name


def _with_additions(
    adapter: AdapterFile, family: str, tags: Sequence[str], thumbnail: str | Path | None
) -> AdapterFile:
    """The adapter with what the user adds to its metadata; its own family stays."""
    old = adapter.metadata
    counts = dict(old.tag_frequency)
    metadata = dataclasses.replace(
        old,
        family=old.family or family,
        tags=tuple(dict.fromkeys((*old.tags, *tags))),
        thumbnail=make_thumbnail(thumbnail) if thumbnail else old.thumbnail,
        tag_frequency=dict.fromkeys(tags, 1) | counts if counts else counts,
    )
    return dataclasses.replace(adapter, metadata=metadata)


def check_free(
    output: Path, file_name: str | None, inputs: Sequence[Path], overwrite: bool
) -> None:
    """Refuse an output that exists, would replace what it is made from, or cannot be written."""
    if output.suffix in PICKLED:
        raise ExportError(f"{output.name}: pickles are not written; use the suffix .safetensors")
    file = output if output.suffix == ".safetensors" or file_name is None else output / file_name
    require_writable(file, is_folder=file_name is None)
    if not file.exists():
        return
    for path in inputs:
        # A PEFT folder may be that of one component, inside of the output.
        is_around = file.is_dir() and file.resolve() in path.resolve().parents
        if is_around or (path.exists() and file.samefile(path)):
            raise ExportError(f"{file} is or holds what is read for it; choose another name")
    refuse_existing([file], overwrite)
