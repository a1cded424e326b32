"""Canonical module names, ``component.path``, and the names of UNet modules in the original code.

The original code (sgm) numbers one flat list of blocks, while Diffusers nests them by level. With
``n = layers_per_block``, level ``l`` and layer ``i``:

    down_blocks.l.resnets.i       <-> input_blocks.(l * (n + 1) + i + 1).0
    down_blocks.l.attentions.i    <-> input_blocks.(l * (n + 1) + i + 1).1
    down_blocks.l.downsamplers.0  <-> input_blocks.((l + 1) * (n + 1)).0
    mid_block.resnets.i           <-> middle_block.(2 * i)
    mid_block.attentions.i        <-> middle_block.(2 * i + 1)
    up_blocks.l.resnets.i         <-> output_blocks.(l * (n + 1) + i).0
    up_blocks.l.attentions.i      <-> output_blocks.(l * (n + 1) + i).1
    up_blocks.l.upsamplers.0      <-> output_blocks.(l * (n + 1) + n).{1, or 2 after attention}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dora_diffusion.config.families import COMPONENTS, FAMILIES, Family
from dora_diffusion.config.file import read_facts
from dora_diffusion.config.wording import listing

NAMES: Mapping[str, Any] = read_facts("formats/names/names")
"""Names of modules and tensors with their names in other layouts, also for everything below them.

The blocks of the UNet are listed above. open_clip joins three projections in one matrix (``#q``).
The longest of several prefixes comes first: OneTrainer's OMI files use ``clip_l``, its COMFY files
the names of ComfyUI. ``#`` stands for a number.
"""


def below(leaves: Mapping[str, str], name: str, original: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of names for the leaves below a module."""
    return ((f"{name}.{leaf}", f"{original}.{other}") for leaf, other in leaves.items())


class NameTable:
    """Table of ``(canonical, original)`` names, which also apply to everything below them.

    Attributes:
        original: Canonical name -> original name.
        canonical: Original name -> canonical name.

    Raises:
        ValueError: If the names are not one-to-one.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self.original = dict(pairs)
        self.canonical = {original: name for name, original in pairs}
        for column in zip(*pairs, strict=True):
            if repeated := [name for name, count in Counter(column).items() if count > 1]:
                raise ValueError(f"names that are not one-to-one: {listing(repeated)}")
        for names in (self.original, self.canonical):
            if nested := [n for n in names if renamed(n.rpartition(".")[0], names)]:
                raise ValueError(f"names that are below another: {listing(nested)}")

    def below(self, canonical: str, original: str) -> list[tuple[str, str]]:
        """Return the pairs with a prefix on either side."""
        return [(canonical + name, original + other) for name, other in self.original.items()]

    def to_original(self, name: str) -> str | None:
        """Return the original name of a module or tensor, or None."""
        return renamed(name, self.original)

    def to_canonical(self, name: str) -> str | None:
        """Return the canonical name of an original name, or None."""
        return renamed(name, self.canonical)

    def with_underscores(self) -> NameTable:
        """Return the table with names as in kohya's scripts."""
        return NameTable((a.replace(".", "_"), b.replace(".", "_")) for a, b in self.below("", ""))


def renamed(name: str, names: Mapping[str, str], separator: str = ".") -> str | None:
    """Replace the longest known prefix of a name. Returns None if no prefix is known."""
    words = name.split(separator)
    for end in range(len(words), 0, -1):
        if start := names.get(separator.join(words[:end])):
            return separator.join([start, *words[end:]])
    return None


# Row blocks of a matrix that contains several projections.
ROWS = ("#q", "#k", "#v")
COMPONENT_PREFIXES = {**NAMES["prefixes"], **{component: component for component in COMPONENTS}}
# Suffixes of tensors that only some layouts have.
BUFFERS = ("position_ids", "logit_scale", "attn_mask")
# Names in autoencoders of the first Diffusers releases.
_EARLY = NameTable(
    (f"{side}.mid_block.attentions.0.{name}", f"{side}.mid_block.attentions.0.{early}")
    for side in ("encoder", "decoder")
    for name, early in NAMES["vae_early"].items()
)


def with_text_model(path: str) -> str:
    """Return a text-encoder path with one ``text_model.``, which Transformers >= 5.6 omits."""
    while path.startswith("text_model.text_model."):
        path = path.removeprefix("text_model.")
    if path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def language_path(path: str) -> str:
    """Return a path of a language model without the ``model.`` before it; else ""."""
    path = path.removeprefix("model.")
    return path if path.startswith(("layers.", "embed_tokens.", "norm.")) else ""


def encoder_path(path: str) -> str:
    """Return the canonical path of a module or tensor in a text encoder."""
    return language_path(path) or with_text_model(path)


def canonical(component: str, path: str) -> str:
    """Return the canonical name of a module or tensor, such as ``unet.conv_in.weight``."""
    if component.startswith("text_encoder"):
        path = encoder_path(path)
    return f"{component}.{modern_vae_path(path) if component == 'vae' else path}"


def is_flat(text_encoder: object) -> bool:
    """Return whether a text encoder lacks ``text_model``, as in Transformers >= 5.6."""
    return not hasattr(text_encoder, "text_model")


def installed_path(name: str, *, flat: bool) -> str:
    """Return the path of a module in a live model, which may lack ``text_model`` (``flat``)."""
    path = name.partition(".")[2]
    return path.removeprefix("text_model.") if flat else path


def split_component(name: str) -> tuple[str, str]:
    """Split a canonical name: ``"unet.conv_in"`` -> ``("unet", "conv_in")``.

    Raises:
        ValueError: If the name does not start with a known component.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path:
        raise ValueError(f"{name!r} does not start with one of {COMPONENTS}")
    return component, path


def split_prefix(path: str) -> tuple[str | None, str]:
    """Split a dotted name into component (None without a known prefix) and path."""
    for prefix, component in COMPONENT_PREFIXES.items():
        if path.startswith(f"{prefix}."):
            return component, path.removeprefix(f"{prefix}.")
    return None, path


def modern_vae_path(path: str) -> str:
    """Return the present name of a tensor from an early Diffusers release."""
    return _EARLY.to_canonical(path) or path


TOP_MODULES: Mapping[str, str] = NAMES["unet_top"]
# Largest number of levels in a layout; the released models have three or four.
_MOST_LEVELS = 9
_RELEASED_LAYERS = 2
_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")


@dataclass(frozen=True)
class UNetLayout:
    """Layout of a UNet, which determines the original block numbers.

    Attributes:
        layers_per_block: Number of resnets in a down level (an up level has one more).
        up_attention: Whether each up level has attention, which changes the upsampler's index.
    """

    layers_per_block: int
    up_attention: tuple[bool, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetLayout:
        """Read the layout from a ``UNet2DConditionModel`` config.

        Raises:
            ValueError: If the levels differ in depth; the original layout cannot number those.
        """
        layers = config.get("layers_per_block", 2)
        if not isinstance(layers, int):
            raise ValueError(f"layers_per_block is {layers!r}; original names need one number")
        types = config.get("up_block_types", ())
        return cls(layers, tuple("CrossAttn" in str(kind) for kind in types))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UNetLayout | None:
        """Read the layout of a denoiser; None if it is no UNet."""
        return cls.from_config(config) if "up_block_types" in config else None

    @classmethod
    def from_text(cls, text: str) -> UNetLayout | None:
        """The layout that a file's metadata record, None if they do not.

        Older files record the depth alone; the attention is then taken to be the released SDXL's.
        """
        match = re.fullmatch("([1-9])(?: up_attention=([01]{1,9}))?", text)
        if match is None:
            return None
        if match[2] is None:
            return cls(int(match[1]), USUAL_LAYOUT.up_attention)
        return cls(int(match[1]), tuple(flag == "1" for flag in match[2]))

    def text(self) -> str:
        """Return the layout's text in metadata, such as ``2 up_attention=110``."""
        flags = "".join("1" if has_attention else "0" for has_attention in self.up_attention)
        return f"{self.layers_per_block} up_attention={flags}"

    @classmethod
    def from_names(cls, names: Iterable[str]) -> UNetLayout:
        """Read the layout from the UNet's module names (complete, without a ``unet.`` prefix).

        Raises:
            ValueError: If names are missing.
        """
        blocks = [match.groups() for match in map(_LEVEL.match, names) if match]
        resnets = [int(i) for side, _, kind, i in blocks if (side, kind) == ("down", "resnets")]
        levels = {int(level) for side, level, _, _ in blocks if side == "up"}
        attention = {int(level) for side, level, kind, _ in blocks
                     if (side, kind) == ("up", "attentions")}  # fmt: skip
        if not resnets or not levels:
            raise ValueError("no down_blocks.*.resnets and up_blocks.* among the module names")
        return cls(max(resnets) + 1, tuple(i in attention for i in range(max(levels) + 1)))

    @classmethod
    def from_original_names(cls, names: Iterable[str]) -> UNetLayout:
        """Read the layout from original names. The first downsampler ends the first level."""
        names = list(names)
        ops = [int(m[1]) for n in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\b", n))]
        step = min(ops, default=_RELEASED_LAYERS + 1)
        attention = {int(m[1]) // step for n in names
                     if (m := re.match(r"output_blocks\.(\d+)\.1\.(?!conv\b)", n))}  # fmt: skip
        return cls(step - 1, tuple(i in attention for i in range(max(attention, default=-1) + 1)))


def released_layout(family: Family) -> UNetLayout:
    """Return the layout of the released UNets of a family."""
    return UNetLayout(_RELEASED_LAYERS, family.up_attention)


# Layout of UNets whose adapter files have names of the original blocks.
USUAL_LAYOUT = next(
    released_layout(family) for family in FAMILIES.values() if family.kohya_names_original_blocks
)


@lru_cache
def unet_names(layout: UNetLayout) -> NameTable:
    """Return the name table of a UNet. Names inside attention blocks are the same in both."""
    return NameTable(_pairs(layout))


def _pairs(layout: UNetLayout) -> Iterator[tuple[str, str]]:
    step, resnet = layout.layers_per_block + 1, NAMES["unet_resnet"]
    yield from TOP_MODULES.items()
    for i in range(2):
        yield from below(resnet, f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    yield "mid_block.attentions.0", "middle_block.1"
    for level in range(_MOST_LEVELS):
        down, up, first = f"down_blocks.{level}", f"up_blocks.{level}", level * step
        for i in range(layout.layers_per_block):
            yield from below(resnet, f"{down}.resnets.{i}", f"input_blocks.{first + i + 1}.0")
            yield f"{down}.attentions.{i}", f"input_blocks.{first + i + 1}.1"
        yield f"{down}.downsamplers.0.conv", f"input_blocks.{first + step}.0.op"
        has_attention = level < len(layout.up_attention) and layout.up_attention[level]
        for i in range(step):
            yield from below(resnet, f"{up}.resnets.{i}", f"output_blocks.{first + i}.0")
            if has_attention:
                yield f"{up}.attentions.{i}", f"output_blocks.{first + i}.1"
        slot = 2 if has_attention else 1
        yield f"{up}.upsamplers.0", f"output_blocks.{first + step - 1}.{slot}"


# More blocks of one kind than the largest known transformer.
MOST_BLOCKS = 64
# End of the original name of a matrix whose halves are the other way round: shift and scale.
SWAPPED = "#swapped"


@lru_cache
def transformer_names(code: str) -> NameTable:
    """Return the name table of a family's transformer: Diffusers' names and the original ones."""
    names = NAMES["transformers"][code]
    pairs = [*names["top"].items()]
    for kind in names["blocks"]:
        for block, original in kind["names"].items():
            for number in range(MOST_BLOCKS):
                pairs += below(kind["leaves"], f"{block}.{number}", f"{original}.{number}")
    return NameTable(pairs)


@lru_cache
def transformer_paths(family: str = "") -> Mapping[str, str]:
    """Return Diffusers' path of each module of a family's transformer, by both of its names.

    A joined matrix has the parent of its parts and a name in ``joined`` of ``names.json``:
    ``layers.0.attention.to_qkv``.

    Args:
        family: Name of the family. Default: the transformers of all families.
    """
    codes = [FAMILIES[family].code] if family else NAMES["transformers"]
    return {path: name for code in codes for path, name in _paths_of(code).items()}


@lru_cache
def _paths_of(code: str) -> Mapping[str, str]:
    names = transformer_names(code).original if code in NAMES["transformers"] else {}
    paths: dict[str, str] = {}
    for name, original in names.items():
        path, module = name.removesuffix(".weight"), original.partition("#")[0]
        joined = _joined(path) if original.endswith(ROWS) else path
        paths |= {path: path, module.removesuffix(".weight"): joined}
    return paths


def _joined(path: str) -> str:
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{next(name for name, parts in NAMES['joined'].items() if leaf in parts)}"


def comfyui_name(path: str, code: str) -> str | None:
    """Return the name of a transformer's module in files for ComfyUI; None if it is unknown.

    ComfyUI patches parts of a joined matrix by their names in Diffusers, and does not know all
    other names of FLUX.2 in Diffusers.

    Args:
        path: Diffusers' path of the module.
        code: Code of the family (`Family.code`).
    """
    original = transformer_names(code).to_original(f"{path}.weight")
    if original is None:
        return None
    facts = NAMES["transformers"][code]
    if not facts["others_by_original"] or original.endswith(ROWS):
        return f"{facts['diffusers_prefixes'][0]}.{path}"
    return f"diffusion_model.{original.removesuffix(SWAPPED).removesuffix('.weight')}"


def comfyui_reads(name: str, code: str) -> bool:
    """Return whether ComfyUI finds a transformer's module by its name in a file of a plain LoRA.

    Args:
        name: Diffusers' or the original path of the module, with prefix.
        code: Code of the family.
    """
    prefix, _, path = name.partition(".")
    facts, table = NAMES["transformers"][code], transformer_names(code)
    if table.to_original(f"{path}.weight"):
        return prefix in facts["diffusers_prefixes"] and path not in facts["not_by_diffusers"]
    inside = (e for f in FAMILIES.values() if f.code == code for e in f.text_encoders)
    starts = tuple(encoder.checkpoint_prefix for encoder in inside if encoder.is_in_denoiser)
    is_known = path in _paths_of(code) or path.startswith(starts)
    return prefix == "diffusion_model" and is_known


@lru_cache
def swapped_modules() -> Mapping[str, str]:
    """Return canonical names of transformers' modules with swapped halves, by original names."""
    return {
        original.removesuffix(f".weight{SWAPPED}"): f"transformer.{name.removesuffix('.weight')}"
        for code in NAMES["transformers"]
        for name, original in transformer_names(code).original.items()
        if original.endswith(SWAPPED)
    }


def has_swapped_halves(name: str, path: str) -> bool:
    """Return whether a layer's rows are those of its original name, with swapped halves.

    Args:
        name: Canonical name of the layer.
        path: Path in a file, with any prefix, and dots or underscores.
    """
    originals = (original for original, own in swapped_modules().items() if own == name)
    return any(path.replace(".", "_").endswith(o.replace(".", "_")) for o in originals)


def known_layout(names: Iterable[str]) -> UNetLayout | None:
    """Return the layout of the UNet from canonical module names, None if they are incomplete."""
    paths = (name.removeprefix("unet.") for name in names if name.startswith("unet."))
    try:
        return UNetLayout.from_names(paths)
    except ValueError:  # no UNet, or only some of its modules
        return None
