"""What an adapter file is, without its base model: a report for people and for scripts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.formats.adapter_file import (
    AdapterFormatError,
    AdapterMetadata,
    find_adapter,
    read_adapter,
)
from dora_diffusion.formats.adapter_keys import PEFT_PREFIX, is_kohya_key, name_resolver
from dora_diffusion.formats.adapter_metadata import OWN, TRAINED_ALPHA, describe, parse_metadata
from dora_diffusion.formats.adapter_targets import PEFT_FILE
from dora_diffusion.formats.module_names import guess_family
from dora_diffusion.formats.safetensors_stream import Header, TensorFileError, read_header
from dora_diffusion.numerics.weights import LayerWeights


@dataclass(frozen=True)
class AdapterReport:
    """Facts of an adapter file.

    Attributes:
        path: The file, or the folder of a PEFT adapter.
        spelling: ``"diffusers"``, ``"kohya"`` or ``"peft"``.
        metadata: What the file says of itself; the family is guessed from shapes if it does not.
        layers: Number of layers per component.
        kinds: Number of layers per kind: ``"Linear"``, ``"Conv2d 1x1"``, ``"Conv2d 3x3"``.
        method: ``"DoRA"``, ``"LoRA"`` or ``"DoRA and LoRA"``.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a LoRA.
        rank: The rank, or JSON per layer if they differ.
        alpha: The alpha as trained, or JSON per layer if they differ.
        parameters: Number of trained values.
        nbytes: Size on disk.
        notes: What to know before using it: which programs load it exactly, and what to repair.
    """

    path: Path
    spelling: str
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


def inspect_adapter(path: str | Path) -> AdapterReport:
    """Read an adapter and report what it is.

    Raises:
        AdapterFormatError: If it is not an adapter that can be read, with the reason.
    """
    found = find_adapter(path)
    files = sorted(found.rglob(PEFT_FILE)) if found.is_dir() else [found]
    headers = _headers(files)
    if _is_for_one_base(headers):
        return _report_for_one_base(found, headers[0])
    adapter = read_adapter(found)
    layers = adapter.layers
    spelling = _spelling(headers)
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    facts = adapter.metadata
    if not facts.family:
        facts = AdapterMetadata(
            guess_family(shapes), facts.base_model, facts.trigger, facts.resolution,
            facts.format_version, facts.extra,
        )  # fmt: skip
    alpha = describe({name: layer.alpha for name, layer in layers.items()})
    return AdapterReport(
        path=found,
        spelling=spelling,
        metadata=facts,
        layers=dict(Counter(name.split(".")[0] for name in layers)),
        kinds=dict(Counter(_kind(layer) for layer in layers.values())),
        method=_method(layers),
        norm_axis=_axis(layers),
        rank=describe({name: layer.rank for name, layer in layers.items()}),
        alpha=facts.extra.get(TRAINED_ALPHA, alpha),
        parameters=sum(_parameters(layer) for layer in layers.values()),
        nbytes=sum(file.stat().st_size for file in files),
        notes=tuple(_notes(spelling, layers, headers)),
    )


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


def _report_for_one_base(path: Path, header: Header) -> AdapterReport:
    """Report what names, shapes and metadata tell, without reading layers."""
    dense = any(key.endswith(".diff") for key in header.specs)
    resolve, mark = name_resolver(), ".diff" if dense else ".lora_up.weight"
    keys = {key: resolve(key.partition(".")[0]) for key in header.specs if key.endswith(mark)}
    components = Counter((name or "other").split(".")[0] for name in keys.values())
    note = "full differences: add them to the base's weights"
    if not dense:
        note = "its magnitudes are changed to be exact in ComfyUI and Forge, and wrong elsewhere"
    own = header.metadata
    return AdapterReport(
        path=path,
        spelling="kohya",
        metadata=parse_metadata(own),
        layers=dict(components),
        kinds=dict(Counter(_kind_of_shape(header.specs[key].shape) for key in keys)),
        method="full differences" if dense else "DoRA",
        norm_axis=own.get(OWN + "norm_axis", "").replace("none", ""),
        rank=own.get(OWN + "rank", ""),
        alpha=own.get(OWN + "alpha", ""),
        parameters=sum(math.prod(spec.shape) for spec in header.specs.values()),
        nbytes=path.stat().st_size,
        notes=(
            note,
            f"for one base model: {parse_metadata(own).base_model or 'which is not said'}",
        ),
    )


def _kind_of_shape(shape: tuple[int, ...]) -> str:
    return "Linear" if len(shape) == 2 else f"Conv2d {shape[2]}x{shape[3]}"


def _spelling(headers: list[Header]) -> str:
    keys = [key for header in headers for key in header.specs]
    if keys and is_kohya_key(keys[0]):
        return "kohya"
    return "peft" if keys and keys[0].startswith(PEFT_PREFIX) else "diffusers"


def _kind(layer: LayerWeights) -> str:
    return _kind_of_shape(layer.weight_shape)


def _method(layers: Mapping[str, LayerWeights]) -> str:
    kinds = sorted({"LoRA" if layer.magnitude is None else "DoRA" for layer in layers.values()})
    return " and ".join(kinds)


def _axis(layers: Mapping[str, LayerWeights]) -> str:
    axes = {layer.norm_axis for layer in layers.values() if layer.magnitude is not None}
    return "mixed" if len(axes) > 1 else next(iter(axes), "")


def _parameters(layer: LayerWeights) -> int:
    magnitude = 0 if layer.magnitude is None else layer.magnitude.numel()
    return layer.down.numel() + layer.up.numel() + magnitude


def _notes(spelling: str, layers: Mapping[str, LayerWeights], headers: list[Header]) -> list[str]:
    keys = [key for header in headers for key in header.specs]
    notes = _consumer_notes(spelling, _axis(layers))
    bare = (k.startswith("text_encoder") and k.endswith(".lora_magnitude_vector") for k in keys)
    if spelling == "diffusers" and any(bare):
        notes.append(
            "diffusers with transformers 5 drops its text-encoder magnitudes without a word: "
            "convert it to diffusers to repair that"
        )
    if spelling == "kohya" and any("lora_magnitude_vector" in key for key in keys):
        notes.append(
            "its magnitude keys were left half renamed by diffusers' own converter, and its alpha "
            "was replaced by the rank: convert it to kohya to repair the keys"
        )
    elif spelling == "kohya" and not any(key.endswith(".alpha") for key in keys):
        notes.append("it does not say its alpha; alpha = rank is assumed")
    if headers and OWN + "format_version" not in headers[0].metadata:
        notes.append("written by another program")
    return notes


def _consumer_notes(spelling: str, axis: str) -> list[str]:
    """Which programs compute the file as it was trained; measured, see docs/formats.md."""
    if not axis:
        return ["a plain LoRA: every program computes it alike"]
    if spelling != "kohya":
        return ["exact in diffusers and PEFT; web UIs need a conversion or a merged checkpoint"]
    notes = ["diffusers drops its magnitudes: convert it to diffusers"]
    if axis == "output":
        notes.append(
            "exact in LyCORIS; ComfyUI, Forge and A1111 compute the output axis differently: "
            "convert it to dense or lora (or comfyui for ComfyUI and Forge)"
        )
    elif axis == "input":
        notes.append(
            "exact in ComfyUI, Forge, A1111 and InvokeAI; LyCORIS expects the output axis unless "
            "it is told otherwise"
        )
    return notes
