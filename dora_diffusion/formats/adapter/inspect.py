"""What an adapter file is: a report for people and for scripts."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from dora_diffusion.formats.adapter.alpha import DIFFUSERS_METADATA
from dora_diffusion.formats.adapter.consumers import (
    BYPASS,
    OLD_KEY_FORMATS,
    OTHER,
    file_kind,
    key_format_of,
    left_out_by_diffusers,
    some_layers,
    stated_approximation,
    tools_for,
    verdicts,
)
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    find_adapter,
    read_adapter,
)
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    TRAINED_ALPHA,
    describe,
    parse_metadata,
)
from dora_diffusion.formats.adapter.report import AdapterReport
from dora_diffusion.formats.adapter.targets.peft import PEFT_FILE
from dora_diffusion.formats.adapter.vera import is_vera
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_shapes
from dora_diffusion.formats.files.header import Header, TensorFileError, read_header
from dora_diffusion.formats.names.kohya import name_resolver
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.wording import listing

# Data types in which numbers are rounded -> the largest relative error of one.
_HALF = {torch.float16: "5e-4", torch.bfloat16: "4e-3"}


def report_on(path: str | Path, base: ModelWeights | None = None) -> AdapterReport:
    """Read an adapter and report what it is.

    Args:
        path: The file or folder.
        base: A model that it may fit; its weights tell the axis of magnitudes whose shape does not.

    Raises:
        AdapterFormatError: If it is not an adapter that can be read, with the reason.
    """
    file = find_adapter(path)
    files = sorted(file.rglob(PEFT_FILE)) if file.is_dir() else [file]
    headers = _headers(files)
    if _is_for_one_base(headers):
        shapes = None if base is None else module_shapes(base)
        return _report_for_one_base(file, headers[0], shapes)
    adapter, fits = _read(file, base)
    layers, axis = adapter.layers, _axis(adapter.layers)
    keys = [key for header in headers for key in header.specs if key not in adapter.tokens]
    key_format = key_format_of(keys)
    readable = key_format if _is_as_programs_read_it(key_format, layers, headers) else OTHER
    metadata = dataclasses.replace(adapter.metadata, family=adapter.family)
    alpha = describe({name: layer.alpha for name, layer in layers.items()})
    return AdapterReport(
        path=file,
        key_format=key_format,
        metadata=metadata,
        layers=dict(Counter(name.split(".")[0] for name in layers)),
        kinds=dict(Counter(layer.kind_and_size for layer in layers.values())),
        method=_method(layers),
        norm_axis=axis,
        rank=describe({name: layer.rank for name, layer in layers.items()}),
        alpha=metadata.extra.get(TRAINED_ALPHA, alpha),
        parameters=_values(adapter, headers),
        nbytes=sum(part.stat().st_size for part in files),
        notes=(*adapter.notes, *_token_notes(adapter), *_notes(readable, axis, headers)),
        tools=verdicts(
            file_kind(readable, axis), layers, keys, stated_approximation(metadata.extra)
        ),
        fits=fits,
        tokens={token: len(tensor.view(-1, tensor.shape[-1]))
                for token, tensor in adapter.tokens.items()},
    )  # fmt: skip


def _values(adapter: AdapterFile, headers: list[Header]) -> int:
    """Trained values: a compact file holds fewer than its layers have."""
    if any(is_vera(header.metadata) for header in headers):
        return sum(math.prod(spec.shape) for header in headers for spec in header.specs.values())
    tokens = sum(tensor.numel() for tensor in adapter.tokens.values())
    return tokens + sum(_parameters(layer) for layer in adapter.layers.values())


def _read(path: Path, base: ModelWeights | None) -> tuple[AdapterFile, str]:
    """The adapter, and whether it fits; one that does not is read all the same."""
    if base is None:
        return read_adapter(path), ""
    try:
        adapter = read_adapter(path, base)
    except AdapterFormatError as error:
        return read_adapter(path), f"no: {str(error).removeprefix(path.name + ': ')}"
    return adapter, f"yes, all {len(adapter.layers)} layers"


def _headers(files: list[Path]) -> list[Header]:
    try:
        return [read_header(file) for file in files if file.suffix == ".safetensors"]
    except TensorFileError as error:
        raise AdapterFormatError(str(error)) from error


def _is_for_one_base(headers: list[Header]) -> bool:
    """Whether it is a ``comfyui`` or ``dense`` file, which cannot be read without its base."""
    if len(headers) != 1:
        return False
    compensated = headers[0].metadata.get(OWN + "target") == "comfyui"
    return compensated or any(key.endswith(".diff") for key in headers[0].specs)


def _report_for_one_base(
    path: Path, header: Header, shapes: Mapping[str, tuple[int, ...]] | None
) -> AdapterReport:
    """Report what names, shapes and metadata tell, without reading layers."""
    dense = any(key.endswith(".diff") for key in header.specs)
    resolve, mark = name_resolver(shapes), ".diff" if dense else ".lora_down.weight"
    keys = {key: resolve(key.partition(".")[0]) for key in header.specs if key.endswith(mark)}
    by_structure = name_resolver()
    components = Counter(
        (name or by_structure(key.partition(".")[0]) or "other").split(".")[0]
        for key, name in keys.items()
    )
    note = "full differences: add them to the base's weights"
    if not dense:
        note = (
            "its magnitudes are changed to be exact in ComfyUI 0.3.64 and Forge: wrong elsewhere, "
            f"and there too if their formula changes; a merged checkpoint never breaks. {BYPASS}: "
            "use its usual loader"
        )
    metadata = header.metadata
    fits = "" if shapes is None else _fits_one_base(header, keys, shapes)
    return AdapterReport(
        path=path,
        key_format="kohya",
        metadata=parse_metadata(metadata),
        layers=dict(components),
        kinds=dict(Counter(_kind_of_shape(header.specs[key].shape) for key in keys)),
        method="full differences" if dense else "DoRA",
        norm_axis=metadata.get(OWN + "norm_axis", "").replace("none", ""),
        rank=metadata.get(OWN + "rank", ""),
        alpha=metadata.get(OWN + "alpha", ""),
        parameters=sum(math.prod(spec.shape) for spec in header.specs.values()),
        nbytes=path.stat().st_size,
        notes=(
            note,
            f"for one base model: {parse_metadata(metadata).base_model or 'which is not said'}",
        ),
        tools=tools_for("dense" if dense else "comfyui"),
        fits=fits,
    )


def _fits_one_base(
    header: Header, keys: Mapping[str, str | None], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """Whether a base has all layers of a ``comfyui`` or ``dense`` file, in their shapes."""
    if unknown := [key for key, name in keys.items() if name is None]:
        return f"no: the model has no module for {listing(unknown, 3)}"
    wrong = [
        f"{name} {_weight_shape(header, key)} on {tuple(shapes[name])}"
        for key, name in keys.items()
        if name is not None and _weight_shape(header, key) != tuple(shapes[name])
    ]
    if wrong:
        return f"no: it was made for another model: {listing(wrong, 3)}"
    return f"yes, all {len(keys)} layers by their names and shapes; it is right for one base only"


def _weight_shape(header: Header, key: str) -> tuple[int, ...]:
    """Shape of the weight that a difference, or the low-rank factors, change."""
    shape = tuple(header.specs[key].shape)
    up = header.specs.get(key.replace(".lora_down.", ".lora_up."))
    return shape if up is None or key.endswith(".diff") else (up.shape[0], *shape[1:])


def _kind_of_shape(shape: tuple[int, ...]) -> str:
    size = "x".join(map(str, shape[2:]))
    return f"Conv{len(shape) - 2}d {size}" if size else "Linear"


def _is_as_programs_read_it(
    key_format: str, layers: Mapping[str, LayerWeights], headers: list[Header]
) -> bool:
    """Whether programs that know the keys also read the numbers as they are meant.

    None takes alpha from what kohya's scripts note of the training; magnitudes must lie along
    their axis; and PEFT makes all layers of a component DoRA, or none.
    """
    specs = {key: spec for header in headers for key, spec in header.specs.items()}
    says_alpha = sum(key.endswith(".alpha") for key in specs) >= len(layers) or key_format == "peft"
    says_alpha |= any(DIFFUSERS_METADATA in header.metadata for header in headers)
    if not says_alpha and any(layer.scale != 1.0 for layer in layers.values()):
        return False
    if key_format != "kohya":
        kinds = {(n.split(".")[0], layer.magnitude is None) for n, layer in layers.items()}
        return len(kinds) == len({component for component, _ in kinds})
    if (axis := _axis(layers)) == "mixed":
        return True
    along = 1 if axis == "input" else 0
    shapes = [spec.shape for key, spec in specs.items() if key.endswith(".dora_scale")]
    return all(len(shape) > 1 and shape[along] == math.prod(shape) for shape in shapes)


def _method(layers: Mapping[str, LayerWeights]) -> str:
    kinds = sorted({"LoRA" if layer.magnitude is None else "DoRA" for layer in layers.values()})
    return " and ".join(kinds)


def _axis(layers: Mapping[str, LayerWeights]) -> str:
    axes = {layer.norm_axis for layer in layers.values() if layer.magnitude is not None}
    return "mixed" if len(axes) > 1 else next(iter(axes), "")


def _parameters(layer: LayerWeights) -> int:
    magnitude = 0 if layer.magnitude is None else layer.magnitude.numel()
    return layer.down.numel() + layer.up.numel() + magnitude


def _token_notes(adapter: AdapterFile) -> list[str]:
    if not adapter.tokens:
        return []
    return [
        f"tokens were trained with it, {listing(adapter.tokens)}: generate uses them; convert and "
        f"export write them as textual-inversion files into a folder {EMBEDDINGS}"
    ]


def _notes(key_format: str, axis: str, headers: list[Header]) -> list[str]:
    notes = []
    keys = [key for header in headers for key in header.specs]
    if left_out := left_out_by_diffusers(keys):
        notes.append(
            f"it mixes two ways to name the factors: diffusers leaves {some_layers(left_out)} "
            "unchanged without a message"
        )
    dtypes = {spec.dtype for header in headers for spec in header.specs.values()}
    for dtype in _HALF.keys() & dtypes:
        name = str(dtype).removeprefix("torch.")
        notes.append(f"its numbers are rounded to {name}: exact means up to {_HALF[dtype]}")
    if key_format in (OTHER, *OLD_KEY_FORMATS):
        notes.append("programs read few of such files as they are meant: convert it for yours")
    elif not axis:
        notes.append("a plain LoRA: it has no magnitudes, which programs compute in several ways")
    elif key_format != "kohya":
        notes.append("for web UIs export a merged checkpoint, which never breaks, or convert it")
    elif axis == "output":
        notes.append(
            "for web UIs export a merged checkpoint, which never breaks, or convert it to dense, "
            "lora or comfyui; for diffusers convert it to diffusers"
        )
    if key_format == "kohya" and axis:
        notes.append(f"{BYPASS}: use its usual loader, or convert the adapter to lora or dense")
    if headers and OWN + "format_version" not in headers[0].metadata:
        notes.append("written by another program")
    return notes
