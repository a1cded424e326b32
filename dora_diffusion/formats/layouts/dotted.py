"""Keys with dots, as PEFT and Diffusers write them, and what files of both have in common.

PEFT: ``base_model.model.<module>.lora_A.weight``, of an Embedding ``<module>.lora_embedding_A``.
Diffusers new and old: ``unet.<module>.lora_A.weight``, ``.lora.down.weight``,
``processor.to_q_lora.down.weight``, ``text_encoder.<module>.lora_linear_layer.down.weight``.
OneTrainer: original blocks with dots, bare or behind ``unet.`` or ``diffusion_model.``.
"""
# ruff: noqa: D102 - what the methods are for is said in `layout`.

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import cast

from torch import Tensor

from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    Key,
    Layers,
    Layout,
    Part,
    WriteOptions,
    factors,
)
from dora_diffusion.formats.names.kohya import Resolve, component_of, is_kohya_name, is_sgm_path
from dora_diffusion.formats.names.modules import canonical, split_component, split_prefix
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.wording import listing

PEFT_PREFIX = "base_model.model."
# The optional name in `.lora_A.default.weight` is the PEFT adapter's; it is not part of the module.
_KEY = re.compile(
    r"(.+?)"
    r"(?:\.lora_(A|B)(?:\.[\w-]+)?\.weight"
    r"|\.lora_embedding_(A|B)(?:\.[\w-]+)?"
    r"|\.(?:lora|lora_linear_layer)\.(down|up)\.weight"
    r"|\.lora_(down|up|mid)\.weight"
    r"|_lora\.(down|up)\.weight"
    r"|\.lora_(magnitude)_vector(?:\.[\w-]+)*"
    r"|\.(alpha|dora_scale|magnitude))"
)
_FACTORS = {"A": "down", "B": "up"}
PEFT_FORMS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FORMS = (".lora_embedding_A", ".lora_embedding_B")
EARLY_FORMS = (".lora.down.weight", ".lora.up.weight")
LINEAR_FORMS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
PROCESSOR_FORMS = ("_lora.down.weight", "_lora.up.weight")
# Attention processors of early diffusers named the text encoder's projections as the UNet's.
_OLD_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse_dotted(text: str) -> Key | None:
    """A key with dots, taken apart."""
    match = None if is_kohya_name(text) else _KEY.fullmatch(text)
    if match is None:
        return None
    word = match[match.lastindex or 0]
    part = cast(Part, _FACTORS.get(word, word))
    return Key(text, match[1], text.removeprefix(match[1]), part)


def is_processor(key: Key) -> bool:
    """Whether it is a factor in an attention processor of early diffusers."""
    return key.form in PROCESSOR_FORMS and key.path.rpartition(".")[0].endswith(".processor")


def is_old_form(text: str) -> bool:
    """Whether a key names a factor as the diffusers before PEFT did."""
    key = parse_dotted(text)
    return key is not None and (key.form in EARLY_FORMS + LINEAR_FORMS or is_processor(key))


def mixes_forms(keys: Iterable[str]) -> bool:
    """Whether some of these keys name the factors as PEFT does, and others as old diffusers did."""
    keys = list(keys)
    return any(map(is_old_form, keys)) and any(key.endswith(PEFT_FORMS) for key in keys)


class Dotted(Layout):
    """What layouts with dots in their keys share."""

    def parse(self, key: str) -> Key | None:
        return parse_dotted(key)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        stated, path = split_prefix(key.path.removeprefix(PEFT_PREFIX))
        path = f"{path}.".replace(".processor.", ".")[:-1]
        component = stated or component or component_of(path)
        if component == "unet" and is_sgm_path(path):
            return resolve("lora_unet_" + path.replace(".", "_"))
        return None if component is None else canonical(component, _modern_path(path, component))

    def check(self, layers: Layers) -> None:
        kinds: dict[str, set[bool]] = {}
        for name, layer in layers.items():
            if layer.magnitude is not None and layer.norm_axis == "input":
                raise AdapterFormatError(
                    f"the {self.name} format cannot hold {name}: its magnitude runs along the "
                    "input axis, and PEFT and diffusers only know one magnitude per output. Write "
                    "the kohya format, export a merged checkpoint (exact everywhere), or convert "
                    "to a plain LoRA (lora-diffusers, an approximation)"
                )
            if layer.groups > 1:
                raise AdapterFormatError(
                    f"the {self.name} format cannot hold {name}: of a convolution with groups, "
                    "PEFT's A sees the inputs of all groups, which fits no such weight. Write the "
                    "kohya format, or export a merged checkpoint"
                )
            kinds.setdefault(split_component(name)[0], set()).add(layer.magnitude is not None)
        if mixed := [component for component, kind in kinds.items() if len(kind) == 2]:
            raise AdapterFormatError(
                f"the {self.name} format cannot hold LoRA and DoRA layers in one component "
                f"({listing(mixed)}): PEFT makes all of them DoRA. Write the kohya format instead"
            )

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        if not norm_axis:
            return ["a plain LoRA: it has no magnitudes, which programs compute in several ways"]
        return ["for web UIs export a merged checkpoint, which never breaks, or convert it"]


def _modern_path(path: str, component: str) -> str:
    parent, _, leaf = path.rpartition(".")
    if component != "unet" and leaf in _OLD_TEXT_LEAVES:
        return f"{parent}.{_OLD_TEXT_LEAVES[leaf]}"
    # The first attention processors dropped the index of `to_out.0`.
    return f"{path}.0" if component == "unet" and leaf == "to_out" else path


def peft_tensors(
    prefix: str, layer: LayerWeights, options: WriteOptions, magnitude_suffix: str
) -> dict[str, Tensor]:
    """The tensors of one layer under PEFT's names."""
    down, up = factors(layer, options)
    # Parameters of an Embedding, where other layers have modules: without `.weight`.
    forms = EMBEDDING_FORMS if layer.kind == "embedding" else PEFT_FORMS
    tensors = {prefix + form: tensor for form, tensor in zip(forms, (down, up), strict=True)}
    if layer.magnitude is not None:
        ones = [1] * (layer.down.ndim - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        magnitude = layer.magnitude.float().reshape(shape)
        tensors[f"{prefix}.lora_magnitude_vector{magnitude_suffix}"] = magnitude
    return tensors
