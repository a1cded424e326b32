"""The report on an adapter file, for people and for scripts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_diffusion.formats.adapter.metadata import AdapterMetadata


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter file is.

    Attributes:
        path: The file, or the folder of a PEFT adapter.
        key_format: ``"diffusers"``, ``"kohya"`` or ``"peft"``; of early 2023 ``"attn_procs"``, the
            attention processors of diffusers, and ``"cloneofsimo"``, the first LoRA trainer's
            numbers; ``"other"`` if a key is not as these programs write it.
        metadata: What the file says of itself; the family is guessed from shapes if it does not.
        layers: Number of layers per component.
        kinds: Number of layers per kind: ``"Linear"``, ``"Conv2d 3x3"``, ``"Embedding"``.
        method: ``"DoRA"``, ``"LoRA"`` or ``"DoRA and LoRA"``.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a LoRA.
        rank: The rank, or JSON per layer if they differ.
        alpha: The alpha as trained, or JSON per layer if they differ; of an approximation its own.
        parameters: Number of trained values.
        nbytes: Size on disk.
        tools: Programs, and whether they compute it as it was trained; see docs/formats.md.
        fits: Whether it fits the base model that was given, ``""`` without one.
        tokens: Tokens that were trained with it, and the number of vectors of each.
        notes: What to know before using it, and what to repair.
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
        """The report as plain values, for JSON: what differs between layers is a dictionary."""
        values = {**dataclasses.asdict(self), "path": str(self.path)}
        values |= {name: numbers(values[name]) for name in ("rank", "alpha")}
        extra = {name: numbers(text) for name, text in self.metadata.extra.items()}
        values["metadata"] = {**values["metadata"], "extra": extra}
        return values


def numbers(text: str) -> float | dict[str, float] | str:
    """What a `describe` text holds: one number, or one per layer; any other text as it is."""
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            return {str(name): _number(value) for name, value in values.items()}
        return _number(values)
    except (ValueError, TypeError, RecursionError):
        return text


def _number(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    return int(number) if number.is_integer() else number
