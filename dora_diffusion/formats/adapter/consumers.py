"""Which programs compute an adapter file as it was trained. docs/formats.md gives the reasons.

Every verdict is proven by a test against the program itself (diffusers, PEFT, LyCORIS), or was seen
when the program was run (ComfyUI, Forge, A1111's network code, InvokeAI, sd-scripts); tests restate
the published formulas of ComfyUI and A1111.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dora_diffusion.families import COMPONENTS
from dora_diffusion.formats.adapter.keys import PEFT_PREFIX, is_embedding_key
from dora_diffusion.formats.adapter.metadata import APPROXIMATES, APPROXIMATION_ERROR
from dora_diffusion.formats.names.kohya import KOHYA_PREFIXES
from dora_diffusion.formats.names.unet import TOP_MODULES
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.wording import counted, listing

EXACT = "exact"
# The error of an approximation that is none, but for the rounding of its numbers.
_ROUNDING = 1e-5
_PLAIN = "wrong: the magnitudes are ignored, so it acts as a plain LoRA"
_NOT_FOR_IT = "convert: the file is not made for it"
_OTHER_BASES = "exact for its base: wrong with any other"
BYPASS = "ComfyUI's bypass mode, which patches no weights, ignores the magnitudes"
_UNKNOWN = "convert: its key format is not one that we have checked"
OTHER = "other"
# Of early 2023: the first LoRA trainer's numbers, and attention processors of diffusers.
NUMBERED, PROCESSORS = "cloneofsimo", "attn_procs"
OLD_KEY_FORMATS = (NUMBERED, PROCESSORS)

CONSUMERS = (
    "diffusers",
    "PEFT",
    "LyCORIS",
    "ComfyUI and Forge",
    "A1111",
    "InvokeAI",
    "sd-scripts",
)


# What a file holds -> verdict per consumer, in short before the colon; "-" where it is not known.
_INPUT_NORMS = "wrong: it takes the norms per input"
VERDICTS: Mapping[str, Mapping[str, str]] = {
    kind: dict(zip(CONSUMERS, verdicts, strict=True))
    for kind, verdicts in {
        "diffusers DoRA": (EXACT, *[_NOT_FOR_IT] * 6),
        "peft DoRA": (_NOT_FOR_IT, EXACT, *[_NOT_FOR_IT] * 5),
        "kohya DoRA, output axis": (
            _PLAIN,
            _NOT_FOR_IT,
            EXACT,
            "wrong: it divides by the norm of W where W + delta is meant",
            _INPUT_NORMS,
            _INPUT_NORMS,
            _PLAIN,
        ),
        "kohya DoRA, input axis": (
            _PLAIN,
            _NOT_FOR_IT,
            "exact if told so: with wd_on_output=False, and an error without",
            f"exact: but {BYPASS}",
            EXACT,
            EXACT,
            _PLAIN,
        ),
        "comfyui": (
            _PLAIN,
            _NOT_FOR_IT,
            "wrong: the magnitudes are changed for ComfyUI",
            f"{_OTHER_BASES}; {BYPASS}",
            _INPUT_NORMS,
            _INPUT_NORMS,
            _PLAIN,
        ),
        "dense": ("-", "-", *[_OTHER_BASES] * 4, "-"),
        "kohya LoRA": (EXACT, _NOT_FOR_IT, *[EXACT] * 5),
        "diffusers LoRA": (EXACT, _NOT_FOR_IT, *["-"] * 5),
        "peft LoRA": (_NOT_FOR_IT, EXACT, *["-"] * 5),
        "attn_procs LoRA": (
            "exact if told so: with pipeline.unet.load_lora_adapter(FILE, prefix=None); "
            "load_lora_weights leaves all of it out",
            _NOT_FOR_IT,
            *["-"] * 5,
        ),
        "cloneofsimo LoRA": (_NOT_FOR_IT,) * 7,
    }.items()
}


# All keys of a file must match, to the last letter: diffusers loads nothing where a UNet's
# component is missing, and loses an `.alpha`, a `dora_scale`, or a text encoder's bare magnitude.
_KEY_FORMATS = {
    "kohya": re.compile(
        rf"(?:{'|'.join(KOHYA_PREFIXES)})[^.]+"
        r"\.(?:lora_(?:down|up|mid)\.weight|alpha|dora_scale)"
    ),
    "peft": re.compile(
        re.escape(PEFT_PREFIX)
        + r".+\.(?:lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)"
    ),
    "diffusers": re.compile(
        r"unet\.(?:conv_in|conv_out|time_embedding|add_embedding|mid_block|(?:down|up)_blocks)\b.*"
        r"\.(?:lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?"
        r"|lora\.(?:down|up)\.weight|processor\.\w+_lora\.(?:down|up)\.weight)"
        r"|text_encoder(?:_2)?\..+"
        r"\.(?:(?:lora_[AB]|lora_magnitude_vector|lora_linear_layer\.(?:down|up))\.weight"
        r"|lora_embedding_[AB])"
    ),
    PROCESSORS: re.compile(
        r"(?:mid_block|(?:down|up)_blocks)\b.*\.attn[12]\.processor"
        r"\.to_(?:q|k|v|out)_lora\.(?:down|up)\.weight"
    ),
    NUMBERED: re.compile(r"(?:unet|text_encoder):\d+:(?:down|up)"),
}
# How the two factors of a layer are named: PEFT's way, and that of the diffusers before it.
_PEFT_FACTORS = re.compile(r".+\.lora_[AB]\.weight")
_OLD_FACTORS = re.compile(
    r".+(?:\.lora|\.lora_linear_layer|\.processor\.\w+_lora)\.(?:down|up)\.weight"
)
_ALPHA_IS_LOST = re.compile(r"^text_encoder\.|\.(?:attn[12]|self_attn)\.")
# Attention projections trained as one matrix, which only some programs split.
_JOINED = ("to_qkv.", "to_kv.", "in_proj.", "qkv_proj.")


def key_format_of(keys: Iterable[str]) -> str:
    """The key format that all keys of a file share: a program's own, or ``"other"``."""
    keys = list(keys)
    if any(joined in key for key in keys for joined in _JOINED):
        return OTHER
    if any(_embedding_alone([key for key in keys if key.startswith(f"{c}.")]) for c in COMPONENTS):
        return OTHER
    if any(mixes_factors(key for key in keys if key.startswith(f"{c}.")) for c in COMPONENTS):
        return OTHER
    for key_format, pattern in _KEY_FORMATS.items():
        if all(map(pattern.fullmatch, keys)):
            return key_format
    return OTHER


def _embedding_alone(keys: Collection[str]) -> bool:
    """Whether diffusers would not see an adapter in these keys of a component, but an error."""
    return any(map(is_embedding_key, keys)) and not any(".lora_A." in key for key in keys)


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


def kohya_lora_in_diffusers(layers: Mapping[str, LayerWeights]) -> str:
    """The verdict on a kohya LoRA in Diffusers (0.42), which reads few text encoders whole.

    It keys the alphas of attention, and of a first text encoder, by names that no module has: they
    get the commonest alpha of their component.
    """
    lost: list[str] = []
    misread: list[str] = []
    for component in dict.fromkeys(name.partition(".")[0] for name in layers):
        part = {name: w for name, w in layers.items() if name.startswith(f"{component}.")}
        ((alpha, _),) = Counter(layer.alpha for layer in part.values()).most_common(1)
        misread += [n for n, w in part.items() if w.alpha != alpha and _ALPHA_IS_LOST.search(n)]
        # It knows the old names, in which attention stands, by this layer's.
        if component == "unet" or any(name.endswith(".out_proj") for name in part):
            attention = []
        else:
            attention = [name for name in part if ".self_attn." in name]
        if component != "unet" and _is_refused(part, attention):
            return f"convert: it refuses such layers of the {component}; convert it to diffusers"
        lost += attention
    if lost:
        return f"wrong: it leaves {some_layers(lost)} unchanged; convert it to diffusers"
    if misread:
        what = f"{some_layers(misread)} another layer's alpha"
        return f"wrong: it gives {what}; convert it to kohya or diffusers"
    return EXACT


def _is_refused(encoder: Mapping[str, LayerWeights], lost: Sequence[str]) -> bool:
    """Whether Diffusers stops at a text encoder: at no name that it knows, or a rank it missed."""
    ranks = Counter(w.rank for name, w in encoder.items() if ".encoder." in name).most_common(1)
    projections = {w.rank for name, w in encoder.items() if name.endswith(".text_projection")}
    missed = projections and projections != {rank for rank, _ in ranks}
    return bool(missed) or (bool(lost) and not any(".mlp." in name for name in encoder))


def file_kind(key_format: str, norm_axis: str, target: str = "") -> str:
    """The key of ``VERDICTS`` for a file, ``""`` if it mixes axes, ``"other"`` for other files.

    Args:
        key_format: From `key_format_of`.
        norm_axis: ``"output"``, ``"input"``, ``"mixed"``, or ``""`` for a plain LoRA.
        target: ``"comfyui"`` or ``"dense"`` for files made for one base model.
    """
    if target in VERDICTS:
        return target
    # PEFT and diffusers know no magnitudes on the input axis.
    if key_format == OTHER or (key_format != "kohya" and norm_axis == "input"):
        return OTHER
    kind = f"{key_format} {'DoRA' if norm_axis else 'LoRA'}"
    if key_format == "kohya" and norm_axis:
        kind += f", {norm_axis} axis"
    return kind if kind in VERDICTS else ""


def tools_for(kind: str) -> dict[str, str]:
    """Verdict per consumer for a file of this kind, empty if it mixes axes."""
    if kind == OTHER:
        return dict.fromkeys(CONSUMERS, _UNKNOWN)
    return dict(VERDICTS[kind]) if kind else {}


@dataclass(frozen=True)
class Approximation:
    """What a file stands in for.

    Attributes:
        of: ``"DoRA"`` or ``"LoRA"``, ``"tuned model"``, ``"sum of the adapters"``.
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
    layers: Mapping[str, LayerWeights],
    keys: Collection[str] = (),
    approximation: Approximation | None = None,
) -> dict[str, str]:
    """Verdict per consumer for one file; empty if it mixes axes.

    Args:
        kind: From `file_kind`.
        layers: Its layers by canonical name.
        keys: Its keys.
        approximation: What it approximates, if it was made from something else.
    """
    tools = tools_for(kind)
    if kind == "kohya LoRA":
        tools["diffusers"] = kohya_lora_in_diffusers(layers)
    if left_out := left_out_by_diffusers(keys):
        tools["diffusers"] = f"wrong: it leaves {some_layers(left_out)} unchanged"
    if approximation is not None:
        method = "DoRA" if "DoRA" in kind else "LoRA"
        exact = f"exact for this {method}, {approximation}"
        tools = {
            program: exact + verdict.removeprefix(EXACT)
            if verdict.partition(":")[0] == EXACT
            else verdict
            for program, verdict in tools.items()
        }
    if kind == "kohya LoRA" and (outside := outside_of_blocks(layers)):
        tools["sd-scripts"] = f"wrong: it leaves {some_layers(outside)} unchanged"
        if tools["diffusers"].startswith(EXACT):
            tools["diffusers"] += (
                f": in 0.42; 0.35 leaves {some_layers(outside)} unchanged, or refuses SDXL's"
            )
    return tools


def outside_of_blocks(layers: Iterable[str]) -> list[str]:
    """Layers beside the blocks of UNet and text encoders, where sd-scripts looks for none."""
    return [
        name
        for name in layers
        if name.removeprefix("unet.") in dict(TOP_MODULES) or name.endswith(".text_projection")
    ]


def some_layers(names: Collection[str]) -> str:
    """``"5 layers (a, b, c and 2 more)"``."""
    return f"{counted(len(names), 'layer')} ({listing(names, 3)})"
