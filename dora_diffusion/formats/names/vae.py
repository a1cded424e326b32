"""Autoencoder tensors: names of the original layout and of early diffusers -> today's diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PATH = re.compile(
    r"(?P<side>encoder|decoder)\."
    r"(?:(?P<top>conv_in|conv_out|norm_out)"
    r"|mid\.block_(?P<mid>\d+)\.(?P<mid_leaf>\w+)"
    r"|mid\.attn_1\.(?P<attention>norm|q|k|v|proj_out)"
    r"|(?:down|up)\.(?P<level>\d+)\.(?:block\.(?P<index>\d+)\.(?P<leaf>\w+)"
    r"|(?P<sampler>down|up)sample\.conv))"
    r"\.(?P<parameter>weight|bias)"
)
_TOP = {"norm_out": "conv_norm_out"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# The first VAEs of diffusers named the attention's projections differently.
_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_EARLY_PATH = re.compile(rf"(.+\.attentions\.0\.)({'|'.join(_EARLY)})(\.\w+)")
_LEVEL = re.compile(r"decoder\.up\.(\d+)\.")


def count_levels(paths: Iterable[str]) -> int:
    """Number of resolution levels, from original names without prefix."""
    return 1 + max((int(m[1]) for path in paths if (m := _LEVEL.match(path))), default=0)


def vae_from_original(path: str, levels: int) -> str | None:
    """Diffusers name of an original one (both without prefix), None if it has none."""
    if path.startswith(("quant_conv.", "post_quant_conv.")):
        return path
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    return f"{match['side']}.{_module(match, levels)}.{match['parameter']}"


def _module(match: re.Match[str], levels: int) -> str:
    if match["top"]:
        return _TOP.get(match["top"], match["top"])
    if match["attention"]:
        return f"mid_block.attentions.0.{_ATTENTION[match['attention']]}"
    if match["mid"]:
        return f"mid_block.resnets.{int(match['mid']) - 1}.{_leaf(match['mid_leaf'])}"
    level, side = int(match["level"]), "down"
    if match["side"] == "decoder":
        level, side = levels - 1 - level, "up"
    if match["sampler"]:
        return f"{side}_blocks.{level}.{side}samplers.0.conv"
    return f"{side}_blocks.{level}.resnets.{match['index']}.{_leaf(match['leaf'])}"


def _leaf(leaf: str) -> str:
    return "conv_shortcut" if leaf == "nin_shortcut" else leaf


def is_attention_weight(path: str) -> bool:
    """Whether an original name is of a projection, a 1x1 convolution there and Linear here."""
    return re.fullmatch(r".+\.mid\.attn_1\.(q|k|v|proj_out)\.weight", path) is not None


def modern_vae_path(path: str) -> str:
    """Today's name of a tensor that an early diffusers named."""
    match = _EARLY_PATH.fullmatch(path)
    return path if match is None else f"{match[1]}{_EARLY[match[2]]}{match[3]}"
