"""The layouts of adapter files: one list, by which every file is read, inspected and written.

Nothing heavy is imported before a layout is asked for: commands show this list in their help.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dora_diffusion.formats.layouts.layout import AdapterLayout


class Conversion(NamedTuple):
    """Conversion of an adapter to a format.

    Attributes:
        summary: Where it is exact.
        written: What was written, as a report says it.
        plain_lora_in: The layout of an approximation without magnitudes; else empty.
        needs_rank: It is asked for with a rank, or a share of the update.
        for_one_base: It holds numbers that are computed from a base model's weights.
        module: The module of its layout, if that is not called as it is.
        title: What the app offers it as, beside the programs.
        is_folder: It is a folder, of a file for each component.
    """

    summary: str
    written: str
    plain_lora_in: str = ""
    needs_rank: bool = False
    for_one_base: bool = False
    module: str = ""
    title: str = ""
    is_folder: bool = False

    @property
    def takes_rank(self) -> bool:
        """True if a rank has an effect."""
        return bool(self.plain_lora_in) or self.needs_rank


# Each layout is the constant of its name, in the module of its name: `kohya.KOHYA`. With what it is
# as a conversion, or None where it is read and not converted to.
LAYOUTS: dict[str, Conversion | None] = {
    "diffusers": Conversion(
        "exact in Diffusers (output axis only)",
        "in the key format of Diffusers"),
    "peft": Conversion(
        "exact in PEFT, a folder per component (output axis only)",
        "in the key format of PEFT, a folder per component",
        title="PEFT (a folder for each component)", is_folder=True),
    "kohya": Conversion(
        "standard dora_scale: exact in LyCORIS, and on the input axis in most web UIs",
        "in the key format of kohya's sd-scripts and LyCORIS", title="LyCORIS"),
    "comfyui": Conversion(
        "output axis compensated for ComfyUI and Forge with one base model; wrong elsewhere",
        "with magnitudes changed for ComfyUI and Forge on one base model", for_one_base=True,
        module="base_specific"),
    "dense": Conversion(
        "full differences for one base model: exact in ComfyUI, Forge and A1111, and large",
        "as full differences for one base model", for_one_base=True, module="base_specific"),
    "vera": None,
    "attn_procs": None,
    "cloneofsimo": None,
    "onetrainer": None,
}  # fmt: skip

KEY_FORMATS = tuple(name for name, one in LAYOUTS.items() if one and not one.for_one_base)
"""Key formats of a fitted adapter."""

FOLDERS = frozenset(name for name, one in LAYOUTS.items() if one and one.is_folder)
"""Layouts that are folders, and downloaded as a .zip."""

# Of a plain LoRA for which none is given.
LORA_RANK = 64

CONVERSIONS: Mapping[str, Conversion] = {
    **{name: conversion for name, conversion in LAYOUTS.items() if conversion},
    "lora": Conversion(
        "plain LoRA for every web UI, approximated for one base model",
        "approximated by a plain LoRA in the key format of kohya's sd-scripts", "kohya",
        for_one_base=True),
    "lora-diffusers": Conversion(
        "plain LoRA for diffusers, approximated for one base model",
        "approximated by a plain LoRA in the key format of Diffusers", "diffusers",
        for_one_base=True),
    "dora": Conversion(
        "the same method with a smaller rank, nearest to the adapter with the base model at hand",
        "with a smaller rank", needs_rank=True),
}  # fmt: skip


class Program(NamedTuple):
    """A program, or a site, that people use adapters in.

    Attributes:
        title: What it is called.
        place: Where it looks for adapters.
        columns: Its columns in `compatibility.COLUMNS`.
        output_axis: The conversion that it needs of magnitudes on the output axis.
        input_axis: Of magnitudes on the input axis.
        lora: Of an adapter without magnitudes.
    """

    title: str
    place: str
    columns: tuple[str, ...]
    output_axis: str
    input_axis: str = "kohya"
    lora: str = "kohya"

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


_WEB_UIS = ("ComfyUI and Forge", "A1111", "InvokeAI")
PROGRAMS: Mapping[str, Program] = {
    "comfyui": Program("ComfyUI", "models/loras", _WEB_UIS[:1], "comfyui"),
    "forge": Program("Forge", "models/Lora", _WEB_UIS[:1], "comfyui"),
    "a1111": Program("A1111", "models/Lora", _WEB_UIS[1:2], "dense"),
    "invokeai": Program("InvokeAI", "Add Model in its model manager", _WEB_UIS[2:], "dense"),
    "diffusers": Program(
        "Diffusers", "any folder: load_lora_weights", ("diffusers",), "diffusers", "lora-diffusers",
        "diffusers"),
    "sd-scripts": Program("sd-scripts", "any folder", ("sd-scripts",), "lora", "lora"),
    "civitai": Program("Civitai", "an upload, for all web UIs", _WEB_UIS, "lora"),
}  # fmt: skip
TARGETS = tuple(dict.fromkeys((*PROGRAMS, *CONVERSIONS)))
"""Targets of a conversion: names of programs, then of formats."""


def layout_named(name: str) -> AdapterLayout:
    """A layout of the list."""
    conversion = LAYOUTS[name]
    module = (conversion and conversion.module) or name
    layout: AdapterLayout = getattr(import_module(f"{__name__}.{module}"), name.upper())
    return layout


def all_layouts() -> list[AdapterLayout]:
    return [layout_named(name) for name in LAYOUTS]
