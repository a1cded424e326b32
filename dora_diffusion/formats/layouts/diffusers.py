"""Diffusers' file, which knows one magnitude per output."""
# ruff: noqa: D102 - what the methods are for is said in `layout`.

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from torch import Tensor
from torch.nn.functional import pad

from dora_diffusion.families import COMPONENTS
from dora_diffusion.formats.adapter.metadata import AdapterMetadata, own_fields
from dora_diffusion.formats.layouts.compatibility import EXACT, NOT_CHECKED, NOT_FOR_IT, table
from dora_diffusion.formats.layouts.dotted import (
    EARLY_FORMS,
    EMBEDDING_FORMS,
    LINEAR_FORMS,
    PEFT_FORMS,
    Dotted,
    is_processor,
    mixes_forms,
    peft_tensors,
)
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    EncodedFile,
    Key,
    Layers,
    WriteOptions,
    unit_scale,
)
from dora_diffusion.formats.names.modules import split_component
from dora_diffusion.numerics.weights import LayerWeights

_UNET = re.compile(
    r"unet\.(?:conv_in|conv_out|time_embedding|add_embedding|mid_block|(?:down|up)_blocks)\b.*"
)
_MAGNITUDE = ".lora_magnitude_vector"
# Of text encoders: diffusers loses a magnitude without `.weight`.
_TEXT_FORMS = (*PEFT_FORMS, *EMBEDDING_FORMS, *LINEAR_FORMS, f"{_MAGNITUDE}.weight")
_UNET_FORMS = (*PEFT_FORMS, *EARLY_FORMS, _MAGNITUDE, f"{_MAGNITUDE}.weight")


class Diffusers(Dotted):
    """``unet.<module>.lora_A.weight``, and the names of releases before PEFT."""

    name = key_format = "diffusers"
    file_name = "pytorch_lora_weights.safetensors"
    verdicts = table(
        {
            "diffusers DoRA": (EXACT, NOT_FOR_IT),
            "diffusers LoRA": (EXACT, NOT_FOR_IT, NOT_CHECKED),
        }
    )

    def owns(self, key: Key) -> bool:
        # It loads nothing where a UNet's component is missing, and loses an `.alpha`, a
        # `dora_scale`, or a text encoder's bare magnitude.
        if key.path.startswith(("text_encoder.", "text_encoder_2.")):
            return key.form in _TEXT_FORMS
        known = key.form in _UNET_FORMS or is_processor(key)
        return known and _UNET.fullmatch(key.path) is not None

    def matches(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        parts = [[key for key in keys if key.startswith(f"{c}.")] for c in COMPONENTS]
        return super().matches(keys, metadata) and not any(
            mixes_forms(part) or _embedding_alone(part) for part in parts
        )

    def check(self, layers: Layers) -> None:
        super().check(layers)
        others = {split_component(n)[0] for n, layer in layers.items() if layer.kind != "embedding"}
        for name, layer in layers.items():
            if layer.kind == "embedding" and split_component(name)[0] not in others:
                raise AdapterFormatError(
                    f"the diffusers format cannot hold {name} alone: Diffusers does not take the "
                    "keys of an Embedding for an adapter's unless another layer of its component "
                    "is adapted too. Adapt one, write the peft format, or export a merged "
                    "checkpoint"
                )

    def encode(
        self, layers: Layers, metadata: AdapterMetadata, options: WriteOptions
    ) -> dict[str, EncodedFile]:
        """The file that diffusers loads exactly in every version.

        The scale is multiplied into ``lora_B``: without ``lora_adapter_metadata``, diffusers takes
        alpha = rank, and with it older and newer versions disagree on what they accept. For the
        same reason layers of one component share a rank (zeros change nothing): older versions
        scale all by one layer's rank.
        """
        ranks: dict[str, int] = {}
        for name, layer in layers.items():
            component = split_component(name)[0]
            ranks[component] = max(ranks.get(component, 0), layer.rank)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            padded = _padded(unit_scale(layer), ranks[split_component(name)[0]])
            tensors |= peft_tensors(name, padded, options, ".weight")
        fields = {"format": "pt", **own_fields(metadata, layers, self.name)}
        return {self.file_name: EncodedFile.of(tensors, fields)}


def _embedding_alone(keys: Collection[str]) -> bool:
    """Whether diffusers would not see an adapter in these keys of a component, but an error."""
    return any(".lora_embedding_" in k for k in keys) and not any(".lora_A." in k for k in keys)


def _padded(layer: LayerWeights, rank: int) -> LayerWeights:
    extra = rank - layer.rank
    if not extra:
        return layer
    down = pad(layer.down, (0, 0) * (layer.down.ndim - 1) + (0, extra))
    up = pad(layer.up, (0, 0) * (layer.up.ndim - 2) + (0, extra))
    return dataclasses.replace(layer, down=down, up=up, alpha=float(rank))


DIFFUSERS = Diffusers()
