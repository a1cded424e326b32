"""The layouts of adapter files: one list, by which every file is read, inspected and written.

What is known of them and of programs is in `programs.json`.

Nothing heavy is imported here: commands show this list in their help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import zip_longest
from typing import NamedTuple

from dora_diffusion.config.file import read_facts


class Conversion(NamedTuple):
    """Conversion of an adapter to a format.

    Attributes:
        summary: Where it is exact.
        written: What was written, as a report says it.
        plain_lora_in: The layout of an approximation without magnitudes; else empty.
        needs_rank: It is asked for with a rank, or a share of the update.
        for_one_base: It holds numbers that are computed from a base model's weights.
        title: What the app offers it as, beside the programs.
        is_folder: It is a folder, of a file for each component.
    """

    summary: str
    written: str
    plain_lora_in: str = ""
    needs_rank: bool = False
    for_one_base: bool = False
    title: str = ""
    is_folder: bool = False

    @property
    def takes_rank(self) -> bool:
        """True if a rank has an effect."""
        return bool(self.plain_lora_in) or self.needs_rank


class Program(NamedTuple):
    """A program, or a site, that people use adapters in.

    Attributes:
        title: What it is called.
        place: Where it looks for adapters.
        columns: Its columns in `COLUMNS`.
        output_axis: The conversion that it needs of magnitudes on the output axis.
        input_axis: Of magnitudes on the input axis.
        lora: Of an adapter without magnitudes.
        clip_skip: Its setting for clip skip, before the number that it takes.
    """

    title: str
    place: str
    columns: Sequence[str]
    output_axis: str
    input_axis: str = "kohya"
    lora: str = "kohya"
    clip_skip: str = ""

    @property
    def takes_dense(self) -> bool:
        """True if it adds full differences to the base's weights."""
        return self.output_axis in ("comfyui", "dense")

    def conversion(self, axes: Set[str], *, is_sum: bool = False) -> str:
        """The conversion that it needs of an adapter.

        Args:
            axes: Those that its magnitudes run along.
            is_sum: A plain LoRA is added to its change, which full differences alone can hold.
        """
        if is_sum and self.takes_dense:
            return "dense"
        return self.output_axis if "output" in axes else self.input_axis if axes else self.lora


FACTS = read_facts("formats/layouts/programs")
"""Layouts, conversions, programs, and what they compute of each kind of file.

Verdicts are in short before the colon; "-" where it is not known; a row's last one is that of the
rest. Every one is proven by a test against the program itself (diffusers, PEFT, LyCORIS), or was
seen when the program was run (ComfyUI, Forge, A1111's network code, InvokeAI, sd-scripts); tests
restate the published formulas of ComfyUI and A1111. Methods are told by ends of keys, as LyCORIS
4.1 (LoHa to T-LoRA) and PEFT 0.21 (IA3, OFT, VeRA, DoRA's relatives) write them; without advice,
one merges with the program that trained the file.
"""

LAYOUTS: dict[str, Conversion | None] = {
    name: Conversion(**entry) if entry else None for name, entry in FACTS["layouts"].items()
}
"""Each layout, with what it is as a conversion; None where it is read and not converted to."""
KEY_FORMATS = tuple(name for name, one in LAYOUTS.items() if one and not one.for_one_base)
"""Key formats of a fitted adapter."""

FOLDERS = frozenset(name for name, one in LAYOUTS.items() if one and one.is_folder)
"""Layouts that are folders, and downloaded as a .zip."""

# Of a plain LoRA for which none is given.
LORA_RANK = 64

CONVERSIONS: Mapping[str, Conversion] = {
    **{name: conversion for name, conversion in LAYOUTS.items() if conversion},
    **{name: Conversion(**entry) for name, entry in FACTS["conversions"].items()},
}
PROGRAMS: Mapping[str, Program] = {
    name: Program(**entry) for name, entry in FACTS["programs"].items()
}
TARGETS = tuple(dict.fromkeys((*PROGRAMS, *CONVERSIONS)))
"""Targets of a conversion: names of programs, then of formats."""
NOT_TARGETS: Mapping[str, str] = {
    "dora": "DoRA is the adapter's method, not a program; name the program that loads the file, "
    "such as comfyui, or diffusers for a DoRA as it was trained; smaller-rank takes a rank"
}
"""Words that are taken for a target, and what to choose instead."""

COLUMNS: tuple[str, ...] = (*FACTS["columns"],)
"""Programs that adapter files are judged for."""
BYPASS: str = FACTS["words"]["bypass"]


def _table(columns: Sequence[str], kinds: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    rows = {kind: zip_longest(columns, row, fillvalue=row[-1]) for kind, row in kinds.items()}
    return {k: {name: v.format(**FACTS["words"]) for name, v in row} for k, row in rows.items()}


VERDICTS = _table(COLUMNS, FACTS["verdicts"])
"""Kind of adapter file -> program -> verdict."""
MODEL_VERDICTS = _table(FACTS["model_columns"], FACTS["model_verdicts"])
"""Kind of whole model -> program -> verdict."""
