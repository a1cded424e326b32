"""Report on an adapter file, for people and for scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, bundled_notes
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter
from dora_diffusion.formats.adapter.metadata import (
    APPROXIMATES,
    APPROXIMATION_ERROR,
    OWN,
    TRAINED_ALPHA,
    AdapterMetadata,
    describe,
    parse_metadata,
)
from dora_diffusion.formats.adapter.stored import StoredAdapter
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_shapes
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import CONVERSIONS
from dora_diffusion.formats.layouts.layout import (
    BUNDLED_TOKEN,
    EXACT,
    AdapterFormatError,
    AdapterLayout,
    Shapes,
    layout_named,
    norm_axes,
)
from dora_diffusion.formats.names.kohya import name_resolver

# Largest error of rounding alone; below it a file is exact.
_ROUNDING = 1e-5
# Dtypes that round numbers -> the largest relative error.
_HALF = {torch.float16: "5e-4", torch.bfloat16: "4e-3"}


@dataclass(frozen=True)
class AdapterReport:
    """Report on an adapter file.

    Attributes:
        path: The file, or the folder of a PEFT adapter.
        key_format: ``"diffusers"``, ``"kohya"`` or ``"peft"``; from early 2023 ``"attn_procs"``,
            the attention processors of diffusers; ``"lokr"``, a LoKr of any program; ``"other"`` if
            a key is not of these programs.
        metadata: Metadata of the file. A missing family is guessed from shapes.
        layers: Number of layers per component.
        kinds: Number of layers per kind: ``"Linear"``, ``"Conv2d 3x3"``, ``"Embedding"``.
        method: ``"DoRA"``, ``"LoRA"`` or ``"DoRA and LoRA"``; ``"LoKr, read as LoRA"``.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a LoRA.
        rank: The rank, or JSON per layer if they differ.
        alpha: The trained alpha, or JSON per layer if they differ; for an approximation its alpha.
        parameters: Number of trained values.
        nbytes: Size on disk.
        tools: Verdict of each program on computing it exactly; see docs/understand/programs.md.
        fits: Whether it fits the given base model; ``""`` without one.
        tokens: Tokens that were trained with it, and the number of vectors of each.
        notes: Advice on using and repairing the file.
    """

    path: Path
    key_format: str
    metadata: AdapterMetadata
    layers: Mapping[str, int]
    kinds: Mapping[str, int]
    method: str
    norm_axis: str
    rank: str
    alpha: str
    parameters: int
    nbytes: int
    notes: tuple[str, ...]
    tools: Mapping[str, str] = field(default_factory=dict)
    fits: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON, with dictionaries for values per layer."""
        values = {**dataclasses.asdict(self), "path": str(self.path)}
        values |= {name: numbers(values[name]) for name in ("rank", "alpha")}
        extra = {name: numbers(text) for name, text in self.metadata.extra.items()}
        values["metadata"] = {**values["metadata"], "extra": extra}
        return values


def report_on(path: str | Path, base: ModelWeights | None = None) -> AdapterReport:
    """Read an adapter and report its method, layers, metadata and compatible programs.

    Args:
        path: The file or folder.
        base: A model to check the adapter against. Its weights determine the axis of magnitudes
            with an ambiguous shape.

    Raises:
        AdapterFormatError: If it cannot be read as an adapter, with the reason.
    """
    stored = StoredAdapter.open(path)
    if stored.layout.form and stored.files[0].config is None:
        shapes = None if base is None else module_shapes(base)
        return _report_unread(stored, stored.layout, shapes)
    adapter, fits = _decoded(stored, base)
    layers = adapter.layers
    axes = norm_axes(layers.values())
    axis = "mixed" if len(axes) > 1 else next(iter(axes), "")
    specs = {
        key: spec for file in stored.files for key, spec in file.specs.items()
        if key not in adapter.tokens and not BUNDLED_TOKEN.fullmatch(key)
    }  # fmt: skip
    fields = {key: text for file in stored.files for key, text in file.metadata.items()}
    meant = stored.layout.is_read_as_meant(layers, specs, fields)
    readable = stored.layout if meant else layout_named("other")
    tools = readable.judge(layers, axis, specs)
    tools = _qualified(tools, adapter.metadata.extra, "DoRA" if axis else "LoRA")
    is_bundled = any(map(BUNDLED_TOKEN.fullmatch, stored.files[0].specs))
    if is_bundled:
        tools["diffusers"] = "convert: it refuses tokens in the file; convert it to diffusers"
    alpha = describe({name: layer.alpha for name, layer in layers.items()})
    methods = {"LoRA" if layer.magnitude is None else "DoRA" for layer in layers.values()}
    method = " and ".join(sorted(methods))
    return AdapterReport(
        path=stored.path,
        key_format=stored.layout.key_format,
        metadata=dataclasses.replace(adapter.metadata, family=adapter.family),
        layers=dict(Counter(name.split(".")[0] for name in layers)),
        kinds=dict(Counter(layer.kind_and_size for layer in layers.values())),
        method=f"{stored.layout.method}, read as {method}" if stored.layout.method else method,
        norm_axis=axis,
        rank=describe({name: layer.rank for name, layer in layers.items()}),
        alpha=adapter.metadata.extra.get(TRAINED_ALPHA, alpha),
        parameters=_parameters(stored, adapter),
        nbytes=stored.nbytes,
        notes=(*_notes(stored, adapter, is_bundled), *readable.advice(axis, specs),
               *([] if OWN + "format_version" in fields else ["written by another program"])),
        tools=tools,
        fits=fits,
        tokens={token: max(len(tensor.view(-1, tensor.shape[-1])) for tensor in vectors.values())
                for token, vectors in adapter.tokens.items()},
    )  # fmt: skip


def stated_error(extra: Mapping[str, str]) -> float | None:
    """Return the relative error that a file's metadata state; 0 if exact, None if unknown."""
    if not extra.get(APPROXIMATES):
        return 0.0
    try:
        error = float(extra.get(APPROXIMATION_ERROR, ""))
    except ValueError:
        return None
    return error if error > _ROUNDING else 0.0


def _qualified(tools: dict[str, str], extra: Mapping[str, str], method: str) -> dict[str, str]:
    """Qualify exact verdicts on an approximation by its error."""
    error, original = stated_error(extra), extra.get(APPROXIMATES, "")
    if error == 0.0:
        return tools
    share = "less than 0.1%" if error is None or error < 0.001 else f"{error:.1%}"
    off = f"approximates the {original}" if error is None else f"is off the {original} by {share}"
    exact = f"exact for this {method}, which {off}"
    is_exact = {program: text.partition(":")[0] == EXACT for program, text in tools.items()}
    return {p: text.replace(EXACT, exact, 1) if is_exact[p] else text for p, text in tools.items()}


def _notes(stored: StoredAdapter, adapter: AdapterFile, is_bundled: bool) -> list[str]:
    """Return notes on repairs, tokens and the precision of numbers."""
    notes = list(adapter.notes)
    if adapter.tokens:
        notes.append(
            f"tokens were trained with it, {listing(adapter.tokens)}: generate uses them; convert "
            f"and export write them as textual-inversion files into a folder {EMBEDDINGS}"
        )
    if is_bundled:
        notes += bundled_notes(adapter.tokens)
    dtypes = {spec.dtype for file in stored.files for spec in file.specs.values()}
    for dtype in _HALF.keys() & dtypes:
        kind = str(dtype).removeprefix("torch.")
        notes.append(f"its numbers are rounded to {kind}: exact means up to {_HALF[dtype]}")
    return notes


def _parameters(stored: StoredAdapter, adapter: AdapterFile) -> int:
    """Return the number of trained values; a compact file has fewer than its layers."""
    if stored.layout.is_compact:
        specs = (item for file in stored.files for item in file.specs.items())
        return sum(math.prod(spec.shape) for key, spec in specs if not key.endswith(".alpha"))
    layers = adapter.layers.values()
    tensors = [t for layer in layers for t in (layer.down, layer.up, layer.magnitude)]
    tensors += [tensor for vectors in adapter.tokens.values() for tensor in vectors.values()]
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _decoded(stored: StoredAdapter, base: ModelWeights | None) -> tuple[AdapterFile, str]:
    """Return the adapter, and whether it fits the base. It is read even if it does not fit."""
    if base is None:
        return read_adapter(stored), ""
    try:
        adapter = read_adapter(stored, base)
    except AdapterFormatError as error:
        reason = str(error).removeprefix(f"{stored.path.name}: ")
        return read_adapter(stored), f"no: {reason}"
    return adapter, f"yes, all {len(adapter.layers)} layers"


def _report_unread(
    stored: StoredAdapter, layout: AdapterLayout, shapes: Shapes | None
) -> AdapterReport:
    """Report from names, shapes and metadata, without reading layers."""
    file = stored.files[0]
    metadata, parsed = file.metadata, parse_metadata(file.metadata)
    notes = [layout.note]
    if CONVERSIONS[layout.name].for_one_base:
        notes.append(f"for one base model: {parsed.base_model or 'unknown'}")
    resolve, by_structure = name_resolver(shapes), name_resolver()
    flat = {key: key.removesuffix(layout.form).replace(".", "_") for key in file.specs}
    keys = {key: resolve(flat[key]) for key in file.specs if key.endswith(layout.form)}
    components = Counter(
        (name or by_structure(flat[key]) or "other").split(".")[0] for key, name in keys.items()
    )
    weight_shapes = {key: _weight_shape(file.specs, key) for key in keys}
    sizes = ["x".join(map(str, shape[2:])) for shape in weight_shapes.values()]
    return AdapterReport(
        path=stored.path,
        key_format=layout.key_format,
        metadata=parsed,
        layers=dict(components),
        kinds=dict(Counter(f"Conv{n.count('x') + 1}d {n}" if n else "Linear" for n in sizes)),
        method=layout.method,
        norm_axis=metadata.get(OWN + "norm_axis", "").replace("none", ""),
        rank=metadata.get(OWN + "rank", ""),
        alpha=metadata.get(OWN + "alpha", ""),
        parameters=sum(math.prod(s.shape) for one in stored.files for s in one.specs.values()),
        nbytes=stored.nbytes,
        notes=(*notes,),
        tools=layout.judge({}, "", file.specs),
        fits="" if shapes is None else _fit_of_shapes(weight_shapes, keys, shapes),
    )


def _fit_of_shapes(weight_shapes: Shapes, keys: Mapping[str, str | None], shapes: Shapes) -> str:
    """Return whether a base has all layers of a file, with their shapes."""
    if unknown := [key for key, name in keys.items() if name is None]:
        return f"no: the model has no module for {listing(unknown, 3)}"
    named = {name: weight_shapes[key] for key, name in keys.items() if name is not None}
    wrong = [f"{n} {s} on {(*shapes[n],)}" for n, s in named.items() if s != (*shapes[n],)]
    if wrong:
        return f"no: it was made for another model: {listing(wrong, 3)}"
    return f"yes, all {len(keys)} layers by their names and shapes"


def _weight_shape(specs: Mapping[str, TensorSpec], key: str) -> tuple[int, ...]:
    """Return the shape of the weight that a difference or low-rank factors change."""
    shape = tuple(specs[key].shape)
    up = specs.get(key.replace(".lora_down.", ".lora_up."))
    return shape if up is None or key.endswith(".diff") else (up.shape[0], *shape[1:])


def numbers(text: str) -> float | dict[str, float] | str:
    """Parse a `describe` text: one number, or one per layer. Other texts are returned unchanged."""

    def number(value: Any) -> float:
        return int(float(value)) if float(value).is_integer() else float(value)

    try:
        values = json.loads(text)
        if isinstance(values, dict):
            return {str(name): number(value) for name, value in values.items()}
        return number(values)
    except (ValueError, TypeError, RecursionError):
        return text
