"""Which programs compute an adapter file as it was trained. docs/formats.md gives the reasons.

Every verdict is proven by a test against the program itself (diffusers, PEFT, LyCORIS), or was seen
when the program was run (ComfyUI, Forge, A1111's network code, InvokeAI, sd-scripts); tests restate
the published formulas of ComfyUI and A1111.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dora_diffusion.families import COMPONENTS
from dora_diffusion.formats.adapter.keys import PEFT_PREFIX
from dora_diffusion.formats.adapter.metadata import APPROXIMATES, APPROXIMATION_ERROR
from dora_diffusion.formats.names.modules import KOHYA_PREFIXES
from dora_diffusion.formats.names.sgm_blocks import TOP_MODULES

EXACT = "exact"
# The error of an approximation that is none, but for the rounding of its numbers.
_ROUNDING = 1e-5
_PLAIN = "wrong: the magnitudes are ignored, so it acts as a plain LoRA"
_NOT_FOR_IT = "convert: the file is not made for it"
_OTHER_BASES = "exact for its base: wrong with any other"
_UNKNOWN = "convert: its key format is not one that we have checked"
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
        invokeai=EXACT,
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
        invokeai=_OTHER_BASES,
    ),
    "kohya LoRA": _verdicts(
        diffusers=EXACT,
        peft=_NOT_FOR_IT,
        lycoris=EXACT,
        comfyui=EXACT,
        a1111=EXACT,
        invokeai=EXACT,
        sd_scripts=EXACT,
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
# How the two factors of a layer are named: PEFT's way, and that of the diffusers before it.
_PEFT_FACTORS = re.compile(r".+\.lora_[AB]\.weight")
_OLD_FACTORS = re.compile(
    r".+(?:\.lora|\.lora_linear_layer|\.processor\.\w+_lora)\.(?:down|up)\.weight"
)
# Attention projections trained as one matrix, which only some programs split.
_JOINED = ("to_qkv.", "to_kv.", "in_proj.", "qkv_proj.")


def spelling_of(keys: Iterable[str]) -> str:
    """The spelling that all keys of a file share: a program's own, or ``"other"``."""
    keys = list(keys)
    if any(joined in key for key in keys for joined in _JOINED):
        return OTHER
    if any(mixes_factors(key for key in keys if key.startswith(f"{c}.")) for c in COMPONENTS):
        return OTHER
    for spelling, pattern in _SPELLINGS.items():
        if all(map(pattern.fullmatch, keys)):
            return spelling
    return OTHER


def mixes_factors(keys: Iterable[str]) -> bool:
    """Whether some of these keys name the factors as PEFT does, and others as old diffusers did."""
    keys = list(keys)
    return any(map(_PEFT_FACTORS.fullmatch, keys)) and any(map(_OLD_FACTORS.fullmatch, keys))


def left_out_by_diffusers(keys: Iterable[str]) -> list[str]:
    """UNet layers that diffusers leaves unchanged, without a message, of a file that mixes names.

    It renames a UNet's keys only if the first one, in alphabetical order, is not PEFT's.
    """
    unet = sorted(key.removeprefix("unet.") for key in keys if key.startswith("unet."))
    if not unet or not mixes_factors(unet) or "lora_A" not in unet[0]:
        return []
    old = [key.replace(".processor.", ".") for key in unet if _OLD_FACTORS.fullmatch(key)]
    return sorted({re.sub(r"[._]lora(_linear_layer)?\.(down|up)\.weight$", "", k) for k in old})


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


@dataclass(frozen=True)
class Approximation:
    """What a plain LoRA stands in for.

    Attributes:
        of: ``"DoRA"`` or ``"LoRA"``.
        error: Relative error of the change of all layers; None if the file does not say it.
    """

    of: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"which approximates the {self.of}"
        share = f"{self.error:.1%}" if self.error >= 0.001 else "less than 0.1%"
        return f"which is off the {self.of} by {share}"


def stated_approximation(extra: Mapping[str, str]) -> Approximation | None:
    """What the metadata of a file of ours say that it approximates; None if it is exact."""
    if not (of := extra.get(APPROXIMATES)):
        return None
    try:
        error = float(extra.get(APPROXIMATION_ERROR, ""))
    except ValueError:
        return Approximation(of, None)
    return Approximation(of, error) if error > _ROUNDING else None


def verdicts(
    kind: str,
    layers: Collection[str],
    keys: Collection[str] = (),
    approximation: Approximation | None = None,
) -> dict[str, str]:
    """Verdict per consumer for one file; empty if it mixes axes.

    Args:
        kind: From `file_kind`.
        layers: Its layers' canonical names.
        keys: Its keys.
        approximation: What it approximates, if it is a plain LoRA made from something else.
    """
    found = tools_for(kind)
    if left_out := left_out_by_diffusers(keys):
        found["diffusers"] = f"wrong: it leaves {some_layers(left_out)} unchanged"
    if approximation is not None:
        found = {
            program: f"exact for this LoRA, {approximation}" if verdict == EXACT else verdict
            for program, verdict in found.items()
        }
    if kind == "kohya LoRA" and (outside := outside_of_blocks(layers)):
        found["sd-scripts"] = f"wrong: it leaves {some_layers(outside)} unchanged"
        found["diffusers"] += (
            f": in 0.42; 0.35 leaves {some_layers(outside)} unchanged, or refuses SDXL's"
        )
    return found


def outside_of_blocks(layers: Iterable[str]) -> list[str]:
    """Layers beside the blocks of UNet and text encoders, where sd-scripts looks for none."""
    return [
        name
        for name in layers
        if name.removeprefix("unet.") in TOP_MODULES or name.endswith(".text_projection")
    ]


def some_layers(names: Collection[str]) -> str:
    """``"5 layers (a, b, c and 2 more)"``."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} layer{'s' * (len(names) != 1)} ({', '.join(names[:3])}{more})"
