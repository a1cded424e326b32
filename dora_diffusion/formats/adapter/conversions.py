"""What an adapter can be converted to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Conversion(NamedTuple):
    """One kind of file.

    Attributes:
        summary: Where it is exact.
        written: What was written, as a report says it.
        plain_lora_in: The key format of an approximation without magnitudes; else empty.
        needs_rank: It is asked for with a rank, or a share of the update.
        for_one_base: It holds numbers that are computed from a base model's weights.
    """

    summary: str
    written: str
    plain_lora_in: str = ""
    needs_rank: bool = False
    for_one_base: bool = False

    @property
    def takes_rank(self) -> bool:
        """Whether a rank has an effect."""
        return bool(self.plain_lora_in) or self.needs_rank


# Of a plain LoRA for which none is given.
LORA_RANK = 64

CONVERSIONS: Mapping[str, Conversion] = {
    "diffusers": Conversion(
        "exact in Diffusers (output axis only)",
        "in the key format of Diffusers"),
    "peft": Conversion(
        "exact in PEFT, a folder per component (output axis only)",
        "in the key format of PEFT, a folder per component"),
    "kohya": Conversion(
        "standard dora_scale: exact in LyCORIS, and on the input axis in most web UIs",
        "in the key format of kohya's sd-scripts and LyCORIS"),
    "comfyui": Conversion(
        "output axis compensated for ComfyUI and Forge with one base model; wrong elsewhere",
        "with magnitudes changed for ComfyUI and Forge on one base model", for_one_base=True),
    "dense": Conversion(
        "full differences for one base model: exact in ComfyUI, Forge and A1111, and large",
        "as full differences for one base model", for_one_base=True),
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
