"""Layouts of adapter files, for reading, inspecting and writing.

`programs.json` describes layouts and programs. This module imports nothing heavy, since commands
show the list in their help.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence, Set
from itertools import zip_longest
from typing import NamedTuple

from dora_diffusion.config.file import read_facts
from dora_diffusion.config.wording import listing


class Conversion(NamedTuple):
    """Conversion of an adapter to a format.

    Attributes:
        summary: Programs or cases in which the conversion is exact.
        written: Description of the result in reports.
        plain_lora_in: Layout of an approximation without magnitudes; else empty.
        needs_rank: Whether a rank or a share of the update must be given.
        for_one_base: Whether the result depends on the weights of one base model.
        title: Name in the app's list of targets.
        is_folder: Whether the result is a folder of files.
        write_only: Whether the result is for programs, and not read as an adapter.
        denoisers: Kinds of denoisers (`config.families.DENOISERS`) that programs read in it, and
            families of which they read more.
        for_transformers: Conversion to use instead for adapters of a transformer.
    """

    summary: str
    written: str
    plain_lora_in: str = ""
    needs_rank: bool = False
    for_one_base: bool = False
    title: str = ""
    is_folder: bool = False
    write_only: bool = False
    denoisers: Sequence[str] = ("unet", "transformer")
    for_transformers: str = ""

    @property
    def takes_rank(self) -> bool:
        """True if a rank has an effect."""
        return bool(self.plain_lora_in) or self.needs_rank


class Program(NamedTuple):
    """Program or site that uses adapters.

    Attributes:
        title: Name of the program.
        place: Folder in which the program searches for adapters.
        columns: Columns of the program in `COLUMNS`.
        output_axis: Conversion for magnitudes on the output axis.
        input_axis: Conversion for magnitudes on the input axis.
        lora: Conversion for adapters without magnitudes.
        clip_skip: Name of the program's setting for clip skip.
        denoisers: Kinds of denoisers, and families, whose adapters can be converted for it.
    """

    title: str
    place: str
    columns: Sequence[str]
    output_axis: str
    input_axis: str = "kohya"
    lora: str = "kohya"
    clip_skip: str = ""
    denoisers: Sequence[str] = ("unet",)

    @property
    def takes_dense(self) -> bool:
        """True if the program can add full differences to the base weights."""
        return self.output_axis in ("comfyui", "dense")

    def conversion(
        self, axes: Set[str], *, is_sum: bool = False, denoisers: Set[str] = frozenset({"unet"})
    ) -> str:
        """Return the conversion that the program needs for an adapter.

        Args:
            axes: Norm axes of the magnitudes.
            is_sum: Whether a plain LoRA is added to the change, which only full differences can
                represent.
            denoisers: Kind and family of the adapter's denoiser.
        """
        if is_sum and self.takes_dense:
            return "dense"
        name = self.output_axis if "output" in axes else self.input_axis if axes else self.lora
        is_named = (denoisers - {"transformer"}) & {*self.denoisers}
        return (not is_named and CONVERSIONS[name].for_transformers) or name


FACTS = read_facts("formats/layouts/programs")
"""Layouts, conversions and programs, with the verdict of each program on each kind of file.

The text before the colon is the short verdict; "-" means unknown. The last verdict of a row applies
to the remaining programs. Each verdict is tested against the program itself (diffusers, PEFT,
LyCORIS), or was observed when the program was run (ComfyUI, Forge, A1111's network code, InvokeAI,
sd-scripts); tests implement the published formulas of ComfyUI and A1111. Methods are identified by
suffixes of keys, as in LyCORIS 4.1 (LoHa to T-LoRA) and PEFT 0.21 (IA3, OFT, VeRA, variants of
DoRA). The default advice is to merge with the program that trained the file.
"""

LAYOUTS: dict[str, Conversion | None] = {
    name: Conversion(**entry) if entry else None for name, entry in FACTS["layouts"].items()
}
"""Layouts with their conversions; None for layouts that are only read."""
KEY_FORMATS = tuple(name for name, layout in LAYOUTS.items() if layout and not layout.write_only)
"""Key formats in which a fitted adapter can be written."""

FOLDERS = frozenset(name for name, layout in LAYOUTS.items() if layout and layout.is_folder)
"""Layouts that are folders and are downloaded as a .zip file."""

# Default rank of a plain LoRA.
LORA_RANK = 64

CONVERSIONS: Mapping[str, Conversion] = {
    **{name: conversion for name, conversion in LAYOUTS.items() if conversion},
    **{name: Conversion(**entry) for name, entry in FACTS["conversions"].items()},
}


def input_format(denoiser: str) -> str:
    """Return the key format that can store magnitudes on the input axis."""
    return "kohya" if denoiser == "unet" else CONVERSIONS["kohya"].for_transformers


PROGRAMS: Mapping[str, Program] = {
    name: Program(**entry) for name, entry in FACTS["programs"].items()
}
TARGETS = tuple(dict.fromkeys((*PROGRAMS, *CONVERSIONS)))
"""Targets of a conversion: names of programs, then of formats."""
NOT_TARGETS: Mapping[str, str] = {
    "dora": "DoRA is the adapter's method, not a program; name the program that loads the file, "
    "such as comfyui, or diffusers for a DoRA as it was trained; smaller-rank takes a rank"
}
"""Words that users mistake for targets, with advice."""

COLUMNS: tuple[str, ...] = (*FACTS["columns"],)
"""Programs with a verdict on adapter files."""
BYPASS: str = FACTS["words"]["bypass"]
COMFYUI_FORMULA: str = FACTS["words"]["comfyui_formula"]
COMFYUI_CHANGE: str = FACTS["words"]["comfyui_change"]
"""Advice on files for ComfyUI after a change of `COMFYUI_FORMULA`."""


def _table(columns: Sequence[str], kinds: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    rows = {kind: zip_longest(columns, row, fillvalue=row[-1]) for kind, row in kinds.items()}
    return {k: {name: v.format(**FACTS["words"]) for name, v in row} for k, row in rows.items()}


VERDICTS = _table(COLUMNS, FACTS["verdicts"])
"""Kind of adapter file -> program -> verdict."""
MODEL_VERDICTS = _table(FACTS["model_columns"], FACTS["model_verdicts"])
"""Kind of whole model -> program -> verdict."""

_MERGE = "merge it with the program that trained it, and use the merged model"
# Key prefixes of whole models, in the original layout and in Diffusers'.
_MODEL_KEYS = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.",
    "down_blocks.0.resnets.0.norm1.weight", "text_model.embeddings.", "embeddings.",
    "cap_embedder.1.weight",
)  # fmt: skip
_NUMBERED = re.compile(r"(unet|text_encoder):\d+:(up|down)")
_PREFIX_TWICE = re.compile(r"(lora_unet_unet|lora_te\d?_te\d?|lora_te\d?_text_encoder)_.*")


def unknown_keys_message(keys: Collection[str]) -> str:
    """Return the message on keys of no layout: of a model, another method or a broken converter."""

    def has(pattern: str | re.Pattern[str]) -> bool:
        return any(re.fullmatch(pattern, key) for key in keys)

    patterns = {method: facts["keys"] for method, facts in FACTS["methods"].items()}
    if any(key.startswith(_MODEL_KEYS) for key in keys):
        return f"it is a model, not an adapter: {listing(keys, 3)}"
    such = f"(keys such as {listing(keys, 3)})"
    if has(_PREFIX_TWICE) and not has(patterns["embeddings bundled with the adapter"]):
        return (
            "its names have the component's prefix twice, as a broken converter wrote them, so "
            f"that no program finds its layers; convert the file that it was made from again {such}"
        )
    if has(_NUMBERED):
        return (
            "its layers have numbers for names, which only the program that wrote it can resolve "
            "(cloneofsimo/lora, of 2022); merge it with that program's lora_add, and make an "
            "adapter from the merged model with 'dora-diffusion extract --base BASE --tuned MODEL "
            f"--rank RANK --output ADAPTER' {such}"
        )
    for method, pattern in patterns.items():
        if has(pattern):
            advice = FACTS["methods"][method].get("advice", _MERGE)
            return f"it holds {method}, which is not part of a LoRA or DoRA; {advice} {such}"
    return f"{len(keys)} keys belong to no known module: {listing(keys)}"
