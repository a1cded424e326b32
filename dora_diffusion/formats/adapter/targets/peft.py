"""Files for Diffusers and PEFT, which know one magnitude per output."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

from torch import Tensor
from torch.nn.functional import pad

from dora_diffusion.formats.adapter.keys import PEFT_PREFIX, AdapterFormatError
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    AdapterMetadata,
    own_fields,
    without_path,
)
from dora_diffusion.formats.adapter.targets.encode import (
    EncodedFile,
    Layers,
    WriteOptions,
    factors,
    unit_scale,
)
from dora_diffusion.formats.names.modules import installed_path, split_component
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.wording import listing

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def encode_diffusers(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """The file that diffusers loads exactly in every version.

    The scale is multiplied into ``lora_B``: without ``lora_adapter_metadata``, diffusers takes
    alpha = rank, and with it older and newer versions disagree on what they accept. For the same
    reason layers of one component share a rank (zeros change nothing): older versions scale all
    by one layer's rank.
    """
    check_diffusers(layers)
    ranks = _largest_ranks(layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        rank = ranks[split_component(name)[0]]
        # `.weight` because diffusers loses a text encoder's magnitude without it.
        tensors |= _peft_tensors(name, _padded(unit_scale(layer), rank), options, ".weight")
    fields = {"format": "pt", **own_fields(metadata, layers, "diffusers")}
    return {DIFFUSERS_FILE: EncodedFile(tensors, fields)}


def encode_peft(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """A folder per component, each for ``PeftModel.from_pretrained(component, folder)``."""
    check_peft(layers)
    files: dict[str, EncodedFile] = {}
    components: dict[str, dict[str, LayerWeights]] = {}
    for name, layer in layers.items():
        components.setdefault(split_component(name)[0], {})[name] = layer
    for component, part in components.items():
        # Only CLIPTextModel was flattened; text_encoder_2 is a CLIPTextModelWithProjection.
        paths = {name: installed_path(name, flat=component == "text_encoder") for name in part}
        tensors: dict[str, Tensor] = {}
        for name, layer in part.items():
            tensors |= _peft_tensors(PEFT_PREFIX + paths[name], layer, options, "")
        fields = {
            "format": "pt",
            **own_fields(metadata, part, "peft"),
            OWN + "component": component,
        }
        files[f"{component}/{PEFT_FILE}"] = EncodedFile(tensors, fields)
        config = _peft_config({paths[name]: layer for name, layer in part.items()}, metadata)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files[f"{component}/{PEFT_CONFIG}"] = EncodedFile(text=text)
    return files


def _peft_config(layers: Layers, metadata: AdapterMetadata) -> dict[str, object]:
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    # Only fields that every PEFT with DoRA knows: older versions reject others.
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": without_path(metadata.base_model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {n: w.rank for n, w in layers.items() if w.rank != rank},
        "alpha_pattern": {n: w.alpha for n, w in layers.items() if w.alpha != alpha},
        "target_modules": sorted(layers),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def check_peft(layers: Layers) -> None:
    """Refuse what PEFT has no key for.

    Raises:
        AdapterFormatError: With the reason, and what to write instead.
    """
    _check_peft_can_hold(layers, "peft")


def check_diffusers(layers: Layers) -> None:
    """Refuse what Diffusers cannot load.

    Raises:
        AdapterFormatError: With the reason, and what to write instead.
    """
    _check_peft_can_hold(layers, "diffusers")
    others = {split_component(n)[0] for n, layer in layers.items() if layer.kind != "embedding"}
    for name, layer in layers.items():
        if layer.kind == "embedding" and split_component(name)[0] not in others:
            raise AdapterFormatError(
                f"the diffusers format cannot hold {name} alone: Diffusers does not take the keys "
                "of an Embedding for an adapter's unless another layer of its component is adapted "
                "too. Adapt one, write the peft format, or export a merged checkpoint"
            )


def _check_peft_can_hold(layers: Layers, target: str) -> None:
    kinds: dict[str, set[bool]] = {}
    for name, layer in layers.items():
        if layer.magnitude is not None and layer.norm_axis == "input":
            raise AdapterFormatError(
                f"the {target} format cannot hold {name}: its magnitude runs along the input "
                "axis, and PEFT and diffusers only know one magnitude per output. Write the kohya "
                "format, export a merged checkpoint (exact everywhere), or convert to a plain LoRA "
                "(lora-diffusers, an approximation)"
            )
        if layer.groups > 1:
            raise AdapterFormatError(
                f"the {target} format cannot hold {name}: of a convolution with groups, PEFT's A "
                "sees the inputs of all groups, which fits no such weight. Write the kohya format, "
                "or export a merged checkpoint"
            )
        kinds.setdefault(split_component(name)[0], set()).add(layer.magnitude is not None)
    if mixed := [component for component, kind in kinds.items() if len(kind) == 2]:
        raise AdapterFormatError(
            f"the {target} format cannot hold LoRA and DoRA layers in one component "
            f"({listing(mixed)}): PEFT makes all of them DoRA. Write the kohya format instead"
        )


def _largest_ranks(layers: Layers) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        component = split_component(name)[0]
        ranks[component] = max(ranks.get(component, 0), layer.rank)
    return ranks


def _padded(layer: LayerWeights, rank: int) -> LayerWeights:
    extra = rank - layer.rank
    if not extra:
        return layer
    down = pad(layer.down, (0, 0) * (layer.down.ndim - 1) + (0, extra))
    up = pad(layer.up, (0, 0) * (layer.up.ndim - 2) + (0, extra))
    return dataclasses.replace(layer, down=down, up=up, alpha=float(rank))


def _peft_tensors(
    prefix: str, layer: LayerWeights, options: WriteOptions, magnitude_suffix: str
) -> dict[str, Tensor]:
    down, up = factors(layer, options)
    if layer.kind == "embedding":
        # Parameters, where other layers have modules: without `.weight`.
        tensors = {f"{prefix}.lora_embedding_A": down, f"{prefix}.lora_embedding_B": up}
    else:
        tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    if layer.magnitude is not None:
        ones = [1] * (layer.down.ndim - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        magnitude = layer.magnitude.float().reshape(shape)
        tensors[f"{prefix}.lora_magnitude_vector{magnitude_suffix}"] = magnitude
    return tensors
