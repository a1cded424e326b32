"""The kohya/LyCORIS key format: names, metadata, and the standard ``dora_scale``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_diffusion.families import FAMILIES, Family, guess_family
from dora_diffusion.formats.adapter.keys import AdapterFormatError, rename_one_to_one
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    UNET_LAYERS,
    AdapterMetadata,
    kohya_fields,
    own_fields,
)
from dora_diffusion.formats.adapter.targets.encode import (
    EncodedFile,
    Layers,
    WriteOptions,
    factors,
    unit_scale,
    with_alpha,
)
from dora_diffusion.formats.files.stream import data_hash
from dora_diffusion.formats.names.kohya import kohya_name
from dora_diffusion.formats.names.unet import USUAL_LAYOUT, UNetLayout
from dora_diffusion.numerics.weights import LayerWeights

KOHYA_FILE = "adapter_kohya.safetensors"


def encode_kohya(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """kohya/LyCORIS names, ``alpha``, and the standard ``dora_scale``, which holds both axes."""
    check_kohya(layers)
    names = kohya_names(layers, metadata, options)
    tensors: dict[str, Tensor] = {}
    for name, layer in _for_other_programs(layers, options).items():
        tensors |= _kohya_tensors(names[name], layer, options)
    fields = kohya_metadata(layers, metadata, options, "kohya")
    return {KOHYA_FILE: EncodedFile(tensors, with_hash(fields, tensors))}


def check_kohya(layers: Layers) -> None:
    """Refuse what no program reads from a file with kohya's names.

    Raises:
        AdapterFormatError: With the reason, and what to write instead.
    """
    for name, layer in layers.items():
        if layer.kind != "plain":
            raise AdapterFormatError(
                f"kohya's key format has no key for {name}, of kind {layer.layer_name}: programs "
                "that read it adapt Linear layers and convolutions. Write diffusers or peft (which "
                "hold magnitudes on the output axis), or export a merged checkpoint"
            )


def with_hash(fields: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Add the hash by which A1111 and adapter managers know a file: of its data alone."""
    return {**fields, "sshs_model_hash": data_hash(tensors)}


def _for_other_programs(layers: Layers, options: WriteOptions) -> Layers:
    """The layers with the alphas that programs read alike; ``B`` makes up for them.

    Diffusers gives a UNet's attention, and text encoders, the commonest alpha of the file: so all
    layers get one. Magnitudes on the input axis have alpha = rank: A1111 computes that axis, but
    its versions differ on whether ``alpha / rank`` acts before the norm or on the whole change.
    """
    others = [layer for layer in layers.values() if not _on_input(layer)]
    alpha = _one_alpha(others, options.dtype)
    return {
        name: unit_scale(layer) if _on_input(layer) else with_alpha(layer, alpha)
        for name, layer in layers.items()
    }


def _on_input(layer: LayerWeights) -> bool:
    return layer.magnitude is not None and layer.norm_axis == "input"


def _one_alpha(layers: Sequence[LayerWeights], dtype: torch.dtype | None) -> float:
    """The smallest alpha of all: half precision loses small numbers first, and so ``B`` grows.

    A larger one where the largest number would come within a factor of 2 of the dtype's limit.
    """
    alphas = {abs(layer.alpha) for layer in layers}
    if len(alphas) < 2:
        return alphas.pop() if alphas else 1.0
    largest = max(abs(layer.alpha) * layer.up.abs().max().item() for layer in layers)
    return max(min(alphas), 2 * largest / torch.finfo(dtype or layers[0].up.dtype).max)


def kohya_names(layers: Layers, metadata: AdapterMetadata, options: WriteOptions) -> dict[str, str]:
    """Canonical module name -> kohya name, for the adapter's family.

    Raises:
        AdapterFormatError: If the family is unknown, or the names are not one-to-one.
    """
    family = _known_family(layers, metadata)
    trained = UNetLayout.from_text(metadata.extra.get(UNET_LAYERS, ""))
    layout = options.unet_layout or trained or USUAL_LAYOUT
    return rename_one_to_one(
        layers, lambda name: kohya_name(name, family, layout), "the kohya format"
    )


def kohya_metadata(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions, target: str
) -> dict[str, str]:
    """All metadata of a kohya-style file."""
    family = _known_family(layers, metadata)
    stored = _for_other_programs(layers, options)
    # What was not trained has no other alpha than the file's.
    fields = own_fields(metadata, stored if "approximation" in metadata.extra else layers, target)
    fields |= kohya_fields(metadata, stored, family, options.title)
    if options.unet_layout and family.kohya_names_original_blocks:
        fields[OWN + UNET_LAYERS] = options.unet_layout.text()
    return fields


def _known_family(layers: Layers, metadata: AdapterMetadata) -> Family:
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    name = metadata.family or guess_family(shapes)
    if not name:
        *others, last = FAMILIES
        raise AdapterFormatError(
            "kohya names differ between model families, and this adapter's family is unknown; "
            f"say which it is ({', '.join(others)} or {last})"
        )
    return FAMILIES[name]


def _kohya_tensors(prefix: str, layer: LayerWeights, options: WriteOptions) -> dict[str, Tensor]:
    down, up = factors(layer, options)
    tensors = {
        f"{prefix}.lora_down.weight": down,
        f"{prefix}.lora_up.weight": up,
        f"{prefix}.alpha": torch.tensor(layer.alpha, dtype=torch.float32),
    }
    if layer.magnitude is not None:
        # Never flat: a flat scale does not tell its axis, and ComfyUI skips the layer.
        lead = (-1,) if layer.norm_axis == "output" else (1, -1)
        shape = (*lead, *[1] * (layer.down.ndim - len(lead)))
        tensors[f"{prefix}.dora_scale"] = layer.magnitude.detach().cpu().float().reshape(shape)
    return tensors
