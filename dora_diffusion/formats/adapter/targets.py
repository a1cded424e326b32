"""The ways to write one adapter. Each target turns layers into named files; a registry holds them.

What each consumer computes from which file differs; see docs/formats.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from dora_diffusion.formats.adapter.keys import (
    PEFT_PREFIX,
    AdapterFormatError,
    listing,
)
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    AdapterMetadata,
    own_fields,
    without_path,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.modules import split_component
from dora_diffusion.formats.names.sgm_blocks import UNetLayout
from dora_diffusion.numerics.weights import LayerWeights

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

Layers = Mapping[str, LayerWeights]


@dataclass(frozen=True)
class WriteOptions:
    """How to write an adapter.

    Attributes:
        dtype: Of the low-rank factors; None keeps theirs. Magnitudes stay float32: rounding one
            moves every weight of its row, and they are small.
        title: Name shown by user interfaces, the file's name without suffix.
        unet_layout: For kohya names of an SDXL UNet that is not shaped like the released one.
        text_model_prefix: In a ``peft`` folder, name CLIPTextModel's modules ``text_model....``,
            as transformers before 5.6 do.
        base_weight: Base weight by canonical module name, for the targets that need it.
        beside: Plain LoRA layers whose change is added, for ``dense``.
    """

    dtype: torch.dtype | None = None
    title: str = ""
    unet_layout: UNetLayout | None = None
    text_model_prefix: bool = False
    base_weight: Callable[[str], Tensor] | None = None
    beside: Layers = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedFile:
    """One file to write: tensors with metadata, or text.

    Attributes:
        tensors: The tensors, by name.
        metadata: The file's metadata.
        text: Content of a text file.
        lazy: In place of ``tensors``, how to make each when it is written: large files are never
            whole in memory.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    lazy: Mapping[str, tuple[TensorSpec, Callable[[], Tensor]]] | None = None


Encode = Callable[[Layers, AdapterMetadata, WriteOptions], dict[str, EncodedFile]]


@dataclass(frozen=True)
class Target:
    """A named way to write an adapter.

    Attributes:
        name: What users call it.
        encode: Layers -> files by relative name.
        file_name: Default name of a single-file target; None for a folder of files.
    """

    name: str
    encode: Encode
    file_name: str | None


def encode_diffusers(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """The file that diffusers loads exactly in every version.

    The scale is multiplied into ``lora_B``: without ``lora_adapter_metadata``, diffusers takes
    alpha = rank, and with it older and newer versions disagree on what they accept. For the same
    reason layers of one component share a rank (zeros change nothing): older versions scale all
    by one layer's rank.
    """
    _check_peft_can_hold(layers, "diffusers")
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
    _check_peft_can_hold(layers, "peft")
    files: dict[str, EncodedFile] = {}
    for component in dict.fromkeys(split_component(name)[0] for name in layers):
        own = {name: layers[name] for name in layers if split_component(name)[0] == component}
        paths = {name: _installed_path(name, options) for name in own}
        tensors: dict[str, Tensor] = {}
        for name, layer in own.items():
            tensors |= _peft_tensors(PEFT_PREFIX + paths[name], layer, options, "")
        fields = {"format": "pt", **own_fields(metadata, own, "peft"), OWN + "component": component}
        files[f"{component}/{PEFT_FILE}"] = EncodedFile(tensors, fields)
        config = _peft_config({paths[name]: layer for name, layer in own.items()}, metadata)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files[f"{component}/{PEFT_CONFIG}"] = EncodedFile(text=text)
    return files


def _installed_path(name: str, options: WriteOptions) -> str:
    component, path = split_component(name)
    # Only CLIPTextModel was flattened; text_encoder_2 is a CLIPTextModelWithProjection.
    flat = component == "text_encoder" and not options.text_model_prefix
    return path.removeprefix("text_model.") if flat else path


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
        "rank_pattern": {n: one.rank for n, one in layers.items() if one.rank != rank},
        "alpha_pattern": {n: one.alpha for n, one in layers.items() if one.alpha != alpha},
        "target_modules": sorted(layers),
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


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


def unit_scale(layer: LayerWeights) -> LayerWeights:
    """The layer with its scale multiplied into ``up``, so that alpha = rank."""
    up = layer.up if layer.scale == 1.0 else (layer.up.float() * layer.scale).to(layer.up.dtype)
    return LayerWeights(layer.down, up, layer.magnitude, float(layer.rank), layer.norm_axis)


def _padded(layer: LayerWeights, rank: int) -> LayerWeights:
    extra = rank - layer.rank
    if not extra:
        return layer
    down = pad(layer.down, (0, 0) * (layer.down.ndim - 1) + (0, extra))
    up = pad(layer.up, (0, 0) * (layer.up.ndim - 2) + (0, extra))
    return LayerWeights(down, up, layer.magnitude, float(rank), layer.norm_axis)


def _peft_tensors(
    prefix: str, layer: LayerWeights, options: WriteOptions, magnitude_suffix: str
) -> dict[str, Tensor]:
    down, up = factors(layer, options)
    tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    if layer.magnitude is not None:
        shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
        magnitude = layer.magnitude.float().reshape(shape)
        tensors[f"{prefix}.lora_magnitude_vector{magnitude_suffix}"] = magnitude
    return tensors


def factors(layer: LayerWeights, options: WriteOptions) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as they are written."""
    dtype = options.dtype
    down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
    return (down, up) if dtype is None else (down.to(dtype), up.to(dtype))
