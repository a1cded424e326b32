"""Diffusers components -> the original single-file layout of SD1, SD2 and SDXL.

A plan lists, for every tensor of the single file, the component tensors it is made from and how.
It is built from names and shapes alone, so a checkpoint can be written one tensor at a time. Each
source tensor is used exactly once and each name is written once, or there is no plan.

    model.diffusion_model.      the UNet, in sgm blocks
    first_stage_model.          the VAE; `decoder.up` is numbered from the output's side
    cond_stage_model.           SD1: CLIP; SD2: open_clip, with q, k, v in one matrix
    conditioner.embedders.0/1.  SDXL: CLIP, and open_clip with a transposed projection
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dora_diffusion.families import Family
from dora_diffusion.formats.adapter.keys import listing
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.modules import with_text_model
from dora_diffusion.formats.names.sgm_blocks import UNetLayout, to_sgm

Operation = Literal["copy", "concatenate", "transpose", "as_conv", "as_integer"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


class CheckpointLayoutError(ValueError):
    """A model that has no single-file layout, or tensors that do not fit it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the single file.

    Attributes:
        key: Its name there.
        sources: Canonical tensor names it is made from, e.g. ``unet.conv_in.weight``.
        operation: How. ``as_conv`` turns ``(C, C)`` into ``(C, C, 1, 1)``; ``concatenate`` joins
            along dim 0.
    """

    key: str
    sources: tuple[str, ...]
    operation: Operation = "copy"


@dataclass(frozen=True)
class ModelFacts:
    """What the layout of a checkpoint depends on, read from a pipeline's configs.

    Attributes:
        family: Of the model.
        unet: Block layout of the UNet.
        vae_levels: Number of resolution levels of the VAE.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        zero_terminal_snr: Whether the noise schedule ends at zero SNR.
    """

    family: Family
    unet: UNetLayout
    vae_levels: int
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False

    @classmethod
    def from_configs(cls, family: Family, configs: Mapping[str, Mapping[str, Any]]) -> ModelFacts:
        """Read the facts from a pipeline's configs, by component name.

        Raises:
            CheckpointLayoutError: If a component is missing or the layout cannot number its blocks.
        """
        if missing := [name for name in ("unet", "vae", "scheduler") if name not in configs]:
            raise CheckpointLayoutError(f"the pipeline has no {listing(missing)} config")
        try:
            unet = UNetLayout.from_config(configs["unet"])
        except ValueError as error:
            raise CheckpointLayoutError(str(error)) from error
        scheduler = configs["scheduler"]
        return cls(
            family=family,
            unet=unet,
            vae_levels=len(configs["vae"]["block_out_channels"]),
            prediction_type=scheduler.get("prediction_type", "epsilon"),
            zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        )


def plan_checkpoint(facts: ModelFacts, names: Iterable[str]) -> list[Entry]:
    """Plan the single file of a model.

    Args:
        facts: The model's layout.
        names: Canonical names of all its tensors: ``unet.``, ``vae.``, ``text_encoder.`` and
            ``text_encoder_2.``; text-encoder paths with or without ``text_model.``.

    Returns:
        Entries sorted by key.

    Raises:
        CheckpointLayoutError: For tensors without a place, or two with the same.
    """
    by_component: dict[str, list[str]] = {}
    for name in names:
        component, _, path = name.partition(".")
        by_component.setdefault(component, []).append(path)
    entries: list[Entry] = []
    for component, paths in by_component.items():
        entries += _plan_component(facts, component, paths)
    if twice := _twice(entry.key for entry in entries):
        raise CheckpointLayoutError(f"several tensors would be written as {listing(twice)}")
    return sorted(entries, key=lambda entry: entry.key)


def _plan_component(facts: ModelFacts, component: str, paths: list[str]) -> list[Entry]:
    encoder = facts.family.text_encoder(component)
    if component == "unet":
        planned = {p: _prefixed(UNET_PREFIX, to_sgm(p, facts.unet)) for p in paths}
        entries = [Entry(key, (f"unet.{p}",)) for p, key in planned.items() if key]
    elif component == "vae":
        entries = [e for p in paths if (e := _vae_entry(p, facts.vae_levels))]
    elif encoder is None:
        name = facts.family.name
        raise CheckpointLayoutError(f"a {name} checkpoint has no place for {component}")
    elif encoder.is_open_clip:
        entries = _open_clip_entries(paths, component, encoder.checkpoint_prefix)
        paths = [p for p in paths if not p.endswith("position_ids")]  # open_clip has none
    else:
        entries = [_clip_entry(p, component, encoder.checkpoint_prefix) for p in paths]
    used = {source for entry in entries for source in entry.sources}
    if lost := [p for p in paths if f"{component}.{p}" not in used]:
        raise CheckpointLayoutError(
            f"tensors of the {component} without a place in a {facts.family.name} checkpoint: "
            f"{listing(lost)}"
        )
    return entries


def _prefixed(prefix: str, name: str | None) -> str | None:
    return None if name is None else prefix + name


def _clip_entry(path: str, component: str, prefix: str) -> Entry:
    operation: Operation = "as_integer" if path.endswith("position_ids") else "copy"
    return Entry(prefix + with_text_model(path), (f"{component}.{path}",), operation)


_VAE_TOP = {"conv_norm_out": "norm_out", "conv_in": "conv_in", "conv_out": "conv_out"}
# The first VAEs of diffusers named the attention's projections differently.
_VAE_ATTENTION = {
    "group_norm": "norm",
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
}
_VAE_PATH = re.compile(
    r"(?P<side>encoder|decoder)\."
    r"(?:(?P<top>conv_in|conv_out|conv_norm_out)"
    r"|mid_block\.resnets\.(?P<mid>\d+)\.(?P<mid_leaf>\w+)"
    r"|mid_block\.attentions\.0\.(?P<attention>to_out\.0|\w+)"
    r"|(?:down|up)_blocks\.(?P<level>\d+)\.(?:resnets\.(?P<index>\d+)\.(?P<leaf>\w+)"
    r"|(?P<sampler>down|up)samplers\.0\.conv))"
    r"\.(?P<parameter>weight|bias)"
)


def _vae_entry(path: str, levels: int) -> Entry | None:
    source = (f"vae.{path}",)
    if path.startswith(("quant_conv.", "post_quant_conv.")):
        return Entry(VAE_PREFIX + path, source)
    match = _VAE_PATH.fullmatch(path)
    if match is None or (match["attention"] and match["attention"] not in _VAE_ATTENTION):
        return None
    key = f"{VAE_PREFIX}{match['side']}.{_vae_module(match, levels)}.{match['parameter']}"
    linear = match["attention"] and match["attention"] != "group_norm"
    # The original attention is made of 1x1 convolutions.
    as_conv = linear and match["parameter"] == "weight"
    return Entry(key, source, "as_conv" if as_conv else "copy")


def _vae_module(match: re.Match[str], levels: int) -> str:
    if match["top"]:
        return _VAE_TOP[match["top"]]
    if match["attention"]:
        return f"mid.attn_1.{_VAE_ATTENTION[match['attention']]}"
    if match["mid"]:
        return f"mid.block_{int(match['mid']) + 1}.{_shortcut(match['mid_leaf'])}"
    level, side = int(match["level"]), "down"
    if match["side"] == "decoder":
        level, side = levels - 1 - level, "up"
    if match["sampler"]:
        return f"{side}.{level}.{side}sample.conv"
    return f"{side}.{level}.block.{match['index']}.{_shortcut(match['leaf'])}"


def _shortcut(leaf: str) -> str:
    return "nin_shortcut" if leaf == "conv_shortcut" else leaf


OPEN_CLIP_TOP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LEAVES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _open_clip_entries(paths: list[str], component: str, prefix: str) -> list[Entry]:
    entries = []
    joined: dict[str, dict[str, str]] = {}
    for path in paths:
        name, source = with_text_model(path), f"{component}.{path}"
        match = _TEXT_LAYER.fullmatch(name)
        if name == "text_projection.weight":
            # open_clip multiplies from the left: x @ P.
            entries.append(Entry(prefix + "text_projection", (source,), "transpose"))
        elif name in OPEN_CLIP_TOP:
            entries.append(Entry(prefix + OPEN_CLIP_TOP[name], (source,)))
        elif match and match[2] in OPEN_CLIP_LEAVES:
            block = f"{prefix}transformer.resblocks.{match[1]}"
            entries.append(Entry(f"{block}.{OPEN_CLIP_LEAVES[match[2]]}.{match[3]}", (source,)))
        elif match and match[2] in QKV:
            key = f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            joined.setdefault(key, {})[match[2]] = source
    complete = {key: parts for key, parts in joined.items() if len(parts) == len(QKV)}
    entries += [
        Entry(key, tuple(parts[name] for name in QKV), "concatenate")
        for key, parts in complete.items()
    ]
    return entries


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def entry_spec(entry: Entry, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """Dtype and shape of an entry, from those of its sources.

    Raises:
        CheckpointLayoutError: If the sources of a joined matrix do not fit together.
    """
    sources = [specs[name] for name in entry.sources]
    dtype, shape = sources[0].dtype, sources[0].shape
    if entry.operation == "concatenate":
        if any(s.dtype != dtype or s.shape[1:] != shape[1:] for s in sources):
            raise CheckpointLayoutError(f"{listing(entry.sources)} cannot be joined")
        return TensorSpec(dtype, (sum(s.shape[0] for s in sources), *shape[1:]))
    if entry.operation == "transpose":
        return TensorSpec(dtype, shape[::-1])
    if entry.operation == "as_conv" and len(shape) == 2:
        return TensorSpec(dtype, (*shape, 1, 1))
    return TensorSpec(torch.int64, shape) if entry.operation == "as_integer" else sources[0]


def build_entry(entry: Entry, tensors: Iterable[Tensor]) -> Tensor:
    """Make an entry's tensor from its sources, in their order."""
    sources = list(tensors)
    if entry.operation == "concatenate":
        return torch.cat(sources)
    if entry.operation == "transpose":
        return sources[0].t().contiguous()
    if entry.operation == "as_conv" and sources[0].ndim == 2:
        return sources[0][:, :, None, None]
    return sources[0].to(torch.int64) if entry.operation == "as_integer" else sources[0]


def marker_tensors(facts: ModelFacts) -> dict[str, Tensor]:
    """The empty tensors by which user interfaces recognise an SDXL model that predicts v."""
    names = marker_names(facts.family, facts.prediction_type, facts.zero_terminal_snr)
    return {name: torch.empty(0) for name in names}


def marker_names(family: Family, prediction_type: str, zero_terminal_snr: bool) -> list[str]:
    """Names of the empty tensors by which a single file says how its noise schedule is meant."""
    if not family.marks_v_prediction or prediction_type != "v_prediction":
        return []
    return ["v_pred", "ztsnr"] if zero_terminal_snr else ["v_pred"]


def _twice(keys: Iterable[str]) -> list[str]:
    return [key for key, count in Counter(keys).items() if count > 1]
