"""Which programs compute an adapter file as it was trained. docs/formats.md gives the reasons.

Every verdict is either proven by a test against the program itself (diffusers, PEFT, LyCORIS) or
against a restatement of its published formula (ComfyUI and Forge, A1111), or taken from its source
(InvokeAI, sd-scripts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dora_diffusion.formats.adapter_keys import PEFT_PREFIX
from dora_diffusion.formats.module_names import KOHYA_PREFIXES

EXACT = "exact"
_PLAIN = "wrong: the magnitudes are ignored, so it acts as a plain LoRA"
_NOT_FOR_IT = "convert: the file is not made for it"
_BY_SOURCE = "exact: by its source, which we have read and not run"
_OTHER_BASES = "exact for its base: wrong with any other"
_UNKNOWN = "convert: its spelling is not one that we have checked"
OTHER = "other"

CONSUMERS = (
    "diffusers",
    "PEFT",
    "LyCORIS",
    "ComfyUI and Forge",
    "A1111",
    "InvokeAI",
    "sd-scripts",
)


def _verdicts(**known: str) -> dict[str, str]:
    """One verdict per consumer, by the first word of its name in lower case."""
    return {name: known.get(name.split()[0].lower().replace("-", "_"), "-") for name in CONSUMERS}


# What a file holds -> verdict per consumer, in short before the colon; "-" where it is not known.
VERDICTS: Mapping[str, Mapping[str, str]] = {
    "diffusers DoRA": _verdicts(
        diffusers=EXACT,
        peft=_NOT_FOR_IT,
        lycoris=_NOT_FOR_IT,
        comfyui=_NOT_FOR_IT,
        a1111=_NOT_FOR_IT,
        invokeai=_NOT_FOR_IT,
        sd_scripts=_NOT_FOR_IT,
    ),
    "peft DoRA": _verdicts(
        diffusers=_NOT_FOR_IT,
        peft=EXACT,
        lycoris=_NOT_FOR_IT,
        comfyui=_NOT_FOR_IT,
        a1111=_NOT_FOR_IT,
        invokeai=_NOT_FOR_IT,
        sd_scripts=_NOT_FOR_IT,
    ),
    "kohya DoRA, output axis": _verdicts(
        diffusers=_PLAIN,
        peft=_NOT_FOR_IT,
        lycoris=EXACT,
        comfyui="wrong: it divides by the norm of W where W + delta is meant",
        a1111="wrong: it takes the norms per input",
        invokeai="wrong: it takes the norms per input",
        sd_scripts=_PLAIN,
    ),
    "kohya DoRA, input axis": _verdicts(
        diffusers=_PLAIN,
        peft=_NOT_FOR_IT,
        lycoris="exact if told so: with wd_on_output=False, and an error without",
        comfyui=EXACT,
        a1111=EXACT,
        invokeai=_BY_SOURCE,
        sd_scripts=_PLAIN,
    ),
    "comfyui": _verdicts(
        diffusers=_PLAIN,
        peft=_NOT_FOR_IT,
        lycoris="wrong: the magnitudes are changed for ComfyUI",
        comfyui=_OTHER_BASES,
        a1111="wrong: it takes the norms per input",
        invokeai="wrong: it takes the norms per input",
        sd_scripts=_PLAIN,
    ),
    "dense": _verdicts(
        lycoris=_OTHER_BASES,
        comfyui=_OTHER_BASES,
        a1111=_OTHER_BASES,
    ),
    "kohya LoRA": _verdicts(
        diffusers=EXACT,
        peft=_NOT_FOR_IT,
        lycoris=EXACT,
        comfyui=EXACT,
        a1111=EXACT,
        invokeai=_BY_SOURCE,
        sd_scripts=_BY_SOURCE,
    ),
    "diffusers LoRA": _verdicts(diffusers=EXACT, peft=_NOT_FOR_IT),
    "peft LoRA": _verdicts(diffusers=_NOT_FOR_IT, peft=EXACT),
}


# All keys of a file must be spelled so, to the last letter: diffusers loads nothing where a UNet's
# component is missing, and loses an `.alpha`, a `dora_scale`, or a text encoder's bare magnitude.
_SPELLINGS = {
    "kohya": re.compile(
        rf"(?:{'|'.join(KOHYA_PREFIXES)})[^.]+"
        r"\.(?:lora_(?:down|up|mid)\.weight|alpha|dora_scale)"
    ),
    "peft": re.compile(re.escape(PEFT_PREFIX) + r".+\.(?:lora_[AB]\.weight|lora_magnitude_vector)"),
    "diffusers": re.compile(
        r"unet\.(?:conv_in|conv_out|time_embedding|add_embedding|mid_block|(?:down|up)_blocks)\b.*"
        r"\.(?:lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?"
        r"|lora\.(?:down|up)\.weight|processor\.\w+_lora\.(?:down|up)\.weight)"
        r"|text_encoder(?:_2)?\..+"
        r"\.(?:lora_[AB]|lora_magnitude_vector|lora_linear_layer\.(?:down|up))\.weight"
    ),
}
# Attention projections trained as one matrix, which only some programs split.
_JOINED = ("to_qkv.", "to_kv.", "in_proj.", "qkv_proj.")


def spelling_of(keys: Iterable[str]) -> str:
    """The spelling that all keys of a file share: a program's own, or ``"other"``."""
    keys = list(keys)
    if any(joined in key for key in keys for joined in _JOINED):
        return OTHER
    for spelling, pattern in _SPELLINGS.items():
        if all(map(pattern.fullmatch, keys)):
            return spelling
    return OTHER


def file_kind(spelling: str, norm_axis: str, target: str = "") -> str:
    """The key of ``VERDICTS`` for a file, ``""`` if it mixes axes, ``"other"`` for other files.

    Args:
        spelling: ``"diffusers"``, ``"kohya"``, ``"peft"`` or ``"other"``.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a plain LoRA.
        target: ``"comfyui"`` or ``"dense"`` for files made for one base model.
    """
    if target in VERDICTS:
        return target
    # PEFT and diffusers know no magnitudes on the input axis.
    if spelling == OTHER or (spelling != "kohya" and norm_axis == "input"):
        return OTHER
    kind = f"{spelling} {'DoRA' if norm_axis else 'LoRA'}"
    if spelling == "kohya" and norm_axis:
        kind += f", {norm_axis} axis"
    return kind if kind in VERDICTS else ""


def tools_for(kind: str) -> dict[str, str]:
    """Verdict per consumer for a file of this kind, empty if it mixes axes."""
    if kind == OTHER:
        return dict.fromkeys(CONSUMERS, _UNKNOWN)
    return dict(VERDICTS[kind]) if kind else {}
