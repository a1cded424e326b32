"""UNet module names: the diffusers blocks and the original (sgm) blocks of Stable Diffusion.

The original code numbers one flat list of blocks, diffusers nests them by level. With
``n = layers_per_block``, level ``l`` and layer ``i``:

    down_blocks.l.resnets.i       <-> input_blocks.(l * (n + 1) + i + 1).0
    down_blocks.l.attentions.i    <-> input_blocks.(l * (n + 1) + i + 1).1
    down_blocks.l.downsamplers.0  <-> input_blocks.((l + 1) * (n + 1)).0
    mid_block.resnets.i           <-> middle_block.(2 * i)
    mid_block.attentions.i        <-> middle_block.(2 * i + 1)
    up_blocks.l.resnets.i         <-> output_blocks.(l * (n + 1) + i).0
    up_blocks.l.attentions.i      <-> output_blocks.(l * (n + 1) + i).1
    up_blocks.l.upsamplers.0      <-> output_blocks.(l * (n + 1) + n).{1, or 2 behind attention}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dora_diffusion.families import FAMILIES, Family

TOP_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET_MODULES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP_BACK = {sgm: name for name, sgm in TOP_MODULES.items()}
_RESNET_BACK = {sgm: name for name, sgm in RESNET_MODULES.items()}

_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_SGM_LEVEL = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")
_SGM_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")


@dataclass(frozen=True)
class UNetLayout:
    """The facts of a UNet that its original block numbers depend on.

    Attributes:
        layers_per_block: Resnets of one down level (an up level has one more).
        up_attention: For each up level, whether it has attention. It moves the upsampler's slot.
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
    def from_text(cls, text: str) -> UNetLayout | None:
        """The layout that a file's metadata record, None if they do not.

        Older files record the depth alone; the rest is then taken to be the released SDXL's.
        """
        match = re.fullmatch("([1-9])(?: up_attention=([01]{1,9}))?", text)
        if match is None:
            return None
        if match[2] is None:
            return cls(int(match[1]), USUAL_LAYOUT.up_attention)
        return cls(int(match[1]), tuple(flag == "1" for flag in match[2]))

    def text(self) -> str:
        """What is recorded of it in metadata, such as ``2 up_attention=110``."""
        flags = "".join("1" if has_attention else "0" for has_attention in self.up_attention)
        return f"{self.layers_per_block} up_attention={flags}"

    @classmethod
    def from_names(cls, names: Iterable[str]) -> UNetLayout:
        """Read the layout from the UNet's module names (complete, without a ``unet.`` prefix)."""
        found = [match for match in map(_LEVEL.match, names) if match]
        resnets = [int(m[4]) for m in found if m[1] == "down" and m[3] == "resnets"]
        levels = {int(m[2]) for m in found if m[1] == "up"}
        attention = {int(m[2]) for m in found if m[1] == "up" and m[3] == "attentions"}
        if not resnets or not levels:
            raise ValueError("no down_blocks.*.resnets and up_blocks.* among the module names")
        return cls(max(resnets) + 1, tuple(i in attention for i in range(max(levels) + 1)))


def released_layout(family: Family) -> UNetLayout:
    """Layout of the released UNets of a family."""
    return UNetLayout(2, family.up_attention)


# Of the UNets that adapter files name by original blocks.
USUAL_LAYOUT = next(
    released_layout(family) for family in FAMILIES.values() if family.kohya_names_original_blocks
)


def to_sgm(name: str, layout: UNetLayout) -> str | None:
    """Original name of one UNet module (or parameter) path, None if it has none."""
    for known, sgm in TOP_MODULES.items():
        if name == known or name.startswith(known + "."):
            return sgm + name[len(known) :]
    if match := _MIDDLE.fullmatch(name):
        kind, index, rest = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.{2 * index + 1}.{rest}"
        return _join(f"middle_block.{2 * index}", _rename_head(rest, RESNET_MODULES))
    if match := _LEVEL.fullmatch(name):
        return _level_to_sgm(match[1], int(match[2]), match[3], int(match[4]), match[5], layout)
    return None


def _level_to_sgm(
    side: str, level: int, kind: str, index: int, rest: str, layout: UNetLayout
) -> str | None:
    step = layout.layers_per_block + 1
    block = f"input_blocks.{level * step + index + 1}"
    if side == "up":
        block = f"output_blocks.{level * step + index}"
    if kind == "resnets":
        return _join(f"{block}.0", _rename_head(rest, RESNET_MODULES))
    if kind == "attentions":
        return f"{block}.1.{rest}"
    if index != 0:
        return None
    if kind == "downsamplers" and side == "down":
        return _join(f"input_blocks.{(level + 1) * step}.0", _rename_head(rest, {"conv": "op"}))
    if kind == "upsamplers" and side == "up":
        behind_attention = level < len(layout.up_attention) and layout.up_attention[level]
        return f"output_blocks.{level * step + step - 1}.{2 if behind_attention else 1}.{rest}"
    return None


def from_sgm(name: str, layout: UNetLayout) -> str | None:
    """Diffusers name of one original UNet module (or parameter) path, None if it has none."""
    for sgm, known in _TOP_BACK.items():
        if name == sgm or name.startswith(sgm + "."):
            return known + name[len(sgm) :]
    if match := _SGM_MIDDLE.fullmatch(name):
        index, rest = int(match[1]), match[2]
        if index % 2:
            return f"mid_block.attentions.{index // 2}.{rest}"
        return _join(f"mid_block.resnets.{index // 2}", _rename_head(rest, _RESNET_BACK))
    if match := _SGM_LEVEL.fullmatch(name):
        return _level_from_sgm(match[1], int(match[2]), int(match[3]), match[4], layout)
    return None


def _level_from_sgm(side: str, block: int, slot: int, rest: str, layout: UNetLayout) -> str | None:
    down = side == "input"
    level, index = divmod(block - 1 if down else block, layout.layers_per_block + 1)
    prefix = f"{'down' if down else 'up'}_blocks.{level}"
    head = rest.split(".")[0]
    if down and slot == 0 and head == "op":
        return _join(f"{prefix}.downsamplers.0", _rename_head(rest, {"op": "conv"}))
    if not down and slot in (1, 2) and head == "conv":
        return f"{prefix}.upsamplers.0.{rest}"
    if slot == 0:
        return _join(f"{prefix}.resnets.{index}", _rename_head(rest, _RESNET_BACK))
    return f"{prefix}.attentions.{index}.{rest}" if slot == 1 else None


def _rename_head(path: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if path == old or path.startswith(old + "."):
            return new + path[len(old) :]
    return None


def _join(prefix: str, rest: str | None) -> str | None:
    return None if rest is None else f"{prefix}.{rest}"
