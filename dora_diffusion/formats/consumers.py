"""Which programs compute an adapter file as it was trained. docs/formats.md gives the reasons.

Every verdict is either proven by a test against the program itself (diffusers, PEFT, LyCORIS) or
against a restatement of its published formula (ComfyUI and Forge, A1111), or taken from its source
(InvokeAI, sd-scripts).
"""

from __future__ import annotations

from collections.abc import Mapping

EXACT = "exact"
_PLAIN = "wrong: the magnitudes are ignored, so it acts as a plain LoRA"
_NOT_FOR_IT = "convert: the file is not made for it"
_BY_SOURCE = "exact: by its source, which we have read and not run"
_OTHER_BASES = "exact for its base: wrong with any other"

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


def file_kind(spelling: str, norm_axis: str, target: str = "") -> str:
    """The key of ``VERDICTS`` for a file, ``""`` if it mixes axes.

    Args:
        spelling: ``"diffusers"``, ``"kohya"`` or ``"peft"``.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a plain LoRA.
        target: ``"comfyui"`` or ``"dense"`` for files made for one base model.
    """
    if target in VERDICTS:
        return target
    kind = f"{spelling} {'DoRA' if norm_axis else 'LoRA'}"
    if spelling == "kohya" and norm_axis:
        kind += f", {norm_axis} axis"
    return kind if kind in VERDICTS else ""


def tools_for(kind: str) -> dict[str, str]:
    """Verdict per consumer for a file of this kind, empty if it mixes axes."""
    return dict(VERDICTS[kind]) if kind else {}
