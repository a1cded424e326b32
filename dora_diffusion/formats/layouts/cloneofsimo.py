"""Files of the first LoRA trainer (cloneofsimo/lora), with numbered layers and trained tokens.

``unet:N:down`` and ``unet:N:up`` are the factors of the N-th layer, with alpha = rank. The metadata
list the classes of modules whose layers are counted, and mark tokens: ``{"<s1>": "<embed>"}``. The
layers are numbered in the order in which Diffusers and Transformers registered the modules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import cast

from torch import Tensor

from dora_diffusion.config.families import DEFAULT_FAMILY
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    Fields,
    Groups,
    Key,
    Part,
    Shapes,
    Tensors,
    factor_pair,
)
from dora_diffusion.formats.names.modules import NAMES, released_layout, split_component

_KEY = re.compile(r"((?:unet|text_encoder):(?:0|[1-9][0-9]{0,5}))(:(up|down))")
_TOKEN_MARK = "<embed>"
_FACTORS: tuple[Part, Part] = ("down", "up")
Shape = tuple[int, ...]
_TRAINER = NAMES["first_trainer"]
_CLASSES: Mapping[str, Sequence[str]] = _TRAINER["classes"]
# A UNet was created with None as its middle block, so that `mid_block` comes after `up_blocks`.
_SIDES = ("down_blocks", "up_blocks", "mid_block")
_KINDS = ("attentions", "resnets")
_UNET_PATH = re.compile(
    r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(attentions|resnets)\.(\d+)\."
    r"(?:transformer_blocks\.(\d+)\.)?(.+)"
)
_TEXT_PATH = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.(.+)")
# Down levels of the released UNets whose first resnet changes the width, as all up levels do.
_WIDER_LEVELS = (1, 2)


class CloneOfSimo(AdapterLayout):
    """``unet:17:down``."""

    name = key_format = "cloneofsimo"
    says_alpha = True

    def parse(self, key: str) -> Key | None:
        match = _KEY.fullmatch(key)
        return Key(key, match[1], match[2], cast(Part, match[3])) if match else None

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return any(map(self.parse, keys))

    def module(self, key: Key, resolve: object, component: str | None) -> None:
        pass  # A number identifies a layer only together with all other layers.

    def tokens(self, keys: Collection[str], metadata: Fields) -> list[str]:
        marked = sorted(name for name, mark in metadata.items() if mark == _TOKEN_MARK)
        return [name for name in marked if name in keys]

    def group(
        self, tensors: Tensors, metadata: Fields, shapes: Shapes | None, component: str | None
    ) -> Groups:
        if left_over := [text for text in tensors if not self.parse(text)]:
            problem = f"{len(left_over)} keys belong to no known module"
            raise AdapterFormatError(f"{problem}: {listing(left_over)}")
        last: dict[str, int] = {}
        for component, number, _ in (text.split(":") for text in tensors):
            last[component] = max(last.get(component, 0), int(number))
        groups: Groups = {}
        for component, highest in last.items():
            paths = [f"{component}:{i}" for i in range(1 + highest)]
            weights = [_weight_shape(tensors, path) for path in paths]
            classes = _classes_in(metadata.get(component, "[]"), component)
            try:
                names = positional_names(component, weights, classes, shapes)
            except ValueError as error:
                raise AdapterFormatError(str(error)) from error
            for path, name in zip(paths, names, strict=True):
                groups[name] = {p: Key(f"{path}:{p}", path, f":{p}", p) for p in _FACTORS}
        return groups


CLONEOFSIMO = CloneOfSimo()


def _weight_shape(tensors: Mapping[str, Tensor], layer: str) -> tuple[int, ...]:
    keys = {part: f"{layer}:{part}" for part in _FACTORS}
    down, up = factor_pair(layer, {p: tensors[key] for p, key in keys.items() if key in tensors})
    return (up.shape[0], *down.shape[1:])


def _classes_in(text: str, component: str) -> list[str]:
    """Parse the metadata of a component: a JSON list of class names."""
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise AdapterFormatError(
            f"its metadata should list the classes of the {component} whose layers it counts"
        )
    return classes


def positional_names(
    component: str,
    shapes: Sequence[Shape],
    classes: Iterable[str],
    known: Mapping[str, Shape] | None = None,
) -> list[str]:
    """Return the canonical names of numbered layers.

    Args:
        component: ``"unet"`` or ``"text_encoder"``.
        shapes: Weight shapes ``(out, in, *k)`` of the layers, in order.
        classes: Classes of the modules whose layers are counted.
        known: Modules of the model with their weight shapes. Default: a released Stable Diffusion 1
            or 2.

    Raises:
        ValueError: If the order of layers in a class is unknown, or no order matches the shapes.
    """
    classes = list(classes) or _TRAINER["default"][component]
    if unknown := [name for name in classes if name not in _CLASSES]:
        raise ValueError(f"it has adapted {listing(unknown)}, whose layers' order is not known")
    leaves = {leaf for name in classes for leaf in _CLASSES[name]}
    if known is None:
        names = _released_names(component, len(shapes))
    else:
        names = [name for name in known if split_component(name)[0] == component]
    for order in _orders(leaves):
        positions = {name: key for name in names if (key := _position(name, order)) is not None}
        ordered = sorted(positions, key=positions.__getitem__)
        if len(ordered) == len(shapes) and _fit(dict(zip(ordered, shapes, strict=True)), known):
            return ordered
    which = "a released Stable Diffusion 1 or 2" if known is None else "this model"
    raise ValueError(
        f"its {counted(len(shapes), f'{component} layer')} cannot be matched to {which}, counted "
        f"in {listing(classes)}: their number or their shapes differ"
    )


def _position(name: str, order: Sequence[str]) -> tuple[int, ...] | None:
    """Return the position of a module in the order of registration; None if it is not counted.

    Args:
        name: Canonical module name.
        order: Leaves below a block, such as ``attn1.to_q``, in the order of registration.
    """
    path = split_component(name)[1]
    if match := _TEXT_PATH.fullmatch(path):
        layer, leaf = match.groups()
        return (int(layer), order.index(leaf)) if leaf in order else None
    if (match := _UNET_PATH.fullmatch(path)) is None or match[6] not in order:
        return None
    side, level, kind, number, block, leaf = match.groups(0)
    numbers = (int(level), _KINDS.index(str(kind)), int(number), int(block))
    return (_SIDES.index(str(side)), *numbers, order.index(str(leaf)))


def _orders(leaves: Collection[str]) -> Iterator[list[str]]:
    """Yield the possible orders of the leaves below a block."""
    # The trainer adapted convolutions only as an option.
    for order, without in product(_TRAINER["orders"], ((), ("conv1", "conv2", "conv_shortcut"))):
        resnet = [leaf for leaf in _CLASSES["ResnetBlock2D"] if leaf not in without]
        yield [leaf for leaf in (*order, *resnet, *_CLASSES["CLIPAttention"]) if leaf in leaves]


def _fit(shapes: Mapping[str, Shape], known: Mapping[str, Shape] | None) -> bool:
    """Return whether modules can have weights of these shapes."""
    if known is not None:
        return all(tuple(known[name]) == tuple(shape) for name, shape in shapes.items())
    widths: dict[str, int] = {}
    for name, (out, into, *kernel) in shapes.items():
        block, _, leaf = name.partition(".transformer_blocks.")
        if not leaf:  # A resnet, or a layer of a text encoder.
            is_conv = ".resnets." in name and not name.endswith("time_emb_proj")
            if bool(kernel) != is_conv or (".self_attn." in name and out != into):
                return False
            continue
        wide = 8 if ".ff." in leaf else 1
        reads_prompt = leaf.endswith(("attn2.to_k", "attn2.to_v"))
        if kernel or widths.setdefault(block, out // wide) * wide != out:
            return False
        if not reads_prompt and into * wide != out:
            return False
    return True


def _released_names(component: str, count: int) -> list[str]:
    """Return the modules of a released model; for a text encoder, as many as the count requires."""
    if component != "unet":
        layers = range(count // len(_CLASSES["CLIPAttention"]))
        attention = [f"{component}.text_model.encoder.layers.{i}.self_attn" for i in layers]
        return [f"{block}.{leaf}" for block in attention for leaf in _CLASSES["CLIPAttention"]]
    return [f"unet.{path}" for path in _released_unet()]


def _released_unet() -> Iterator[str]:
    """Yield the modules of the UNets of Stable Diffusion 1 and 2, which are the same."""
    layout = released_layout(DEFAULT_FAMILY)
    levels = len(layout.up_attention)
    blocks = [("mid_block", True, 1, 2)]
    for level, has_attention in enumerate(layout.up_attention):
        count = layout.layers_per_block
        blocks.append((f"up_blocks.{level}", has_attention, count + 1, count + 1))
        blocks.append((f"down_blocks.{levels - 1 - level}", has_attention, count, count))
    wider = [f"down_blocks.{level}.resnets.0" for level in _WIDER_LEVELS]
    for block, has_attention, attentions, resnets in blocks:
        for i in range(attentions if has_attention else 0):
            transformer = f"{block}.attentions.{i}.transformer_blocks.0"
            yield from (f"{transformer}.{leaf}" for leaf in _TRAINER["orders"][0])
        for i in range(resnets):
            resnet = f"{block}.resnets.{i}"
            has_shortcut = block.startswith("up") or resnet in wider
            leaves = _CLASSES["ResnetBlock2D"][: 4 if has_shortcut else 3]
            yield from (f"{resnet}.{leaf}" for leaf in leaves)
