"""Kohya's key format, and LyCORIS': names, metadata, and the standard ``dora_scale``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dora_diffusion.config.families import FAMILIES, Family, guess_family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    UNET_LAYERS,
    AdapterMetadata,
    kohya_fields,
    own_fields,
)
from dora_diffusion.formats.files.stream import TensorSpec, data_hash
from dora_diffusion.formats.layouts.compatibility import (
    BYPASS,
    EXACT,
    INPUT_NORMS,
    NOT_FOR_IT,
    PLAIN,
    PREFIX,
    some_layers,
    table,
)
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    EncodedFile,
    Key,
    Layers,
    Part,
    WriteOptions,
    factors,
    unit_scale,
    with_alpha,
)
from dora_diffusion.formats.names.kohya import KOHYA_PREFIXES, Resolve, is_kohya_name, kohya_name
from dora_diffusion.formats.names.unet import TOP_MODULES, USUAL_LAYOUT, UNetLayout
from dora_diffusion.numerics.weights import LayerWeights

# Its programs' own, and those that others write behind the same names.
_FORMS: dict[str, Part] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
}
_OTHER_FORMS: dict[str, Part] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".magnitude": "magnitude",  # ai-toolkit: one per output, Linear only
    ".lora_down": "down",  # ai-toolkit's first DoRA, with (1, in) magnitudes
    ".lora_up": "up",
}
_OWN_PATH = re.compile(rf"(?:{'|'.join(KOHYA_PREFIXES)})[^.]+")
_ALPHA_IS_LOST = re.compile(r"^text_encoder\.|\.(?:attn[12]|self_attn)\.")


class Kohya(AdapterLayout):
    """``lora_unet_<module_with_underscores>.lora_down.weight``."""

    name = key_format = "kohya"
    file_name: str | None = "adapter_kohya.safetensors"
    verdicts = table(
        {
            "kohya DoRA, output axis": (
                PLAIN,
                NOT_FOR_IT,
                f"{EXACT}: with {PREFIX}",
                "wrong: it divides by the norm of W where W + delta is meant",
                INPUT_NORMS,
                INPUT_NORMS,
                PLAIN,
            ),
            "kohya DoRA, input axis": (
                PLAIN,
                NOT_FOR_IT,
                f"exact if told so: with wd_on_output=False (else an error) and {PREFIX}",
                f"exact: but {BYPASS}",
                EXACT,
                EXACT,
                PLAIN,
            ),
            "kohya LoRA": (EXACT, NOT_FOR_IT, f"{EXACT}: with {PREFIX}", EXACT),
        }
    )

    def parse(self, key: str) -> Key | None:
        if not is_kohya_name(key):
            return None
        # diffusers' own converter leaves `lora_unet_..._attn1.to_q.lora_magnitude_vector` behind.
        path, mark, name = key.partition(".lora_magnitude_vector")
        if mark:
            return Key(key, path, mark + name, "magnitude")
        for form, part in (_FORMS | _OTHER_FORMS).items():
            if key.endswith(form):
                return Key(key, key.removesuffix(form), form, part)
        return None

    def owns(self, key: Key) -> bool:
        return key.form in _FORMS and _OWN_PATH.fullmatch(key.path) is not None

    def matches(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        made_for_it = metadata.get(OWN + "target") != "comfyui"
        return made_for_it and super().matches(keys, metadata)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        # Inside OneTrainer the prefix alone is joined by a dot: `lora_unet.conv_in.alpha`.
        return resolve(key.path.replace(".", "_"))

    def check(self, layers: Layers) -> None:
        for name, layer in layers.items():
            if layer.kind != "plain":
                raise AdapterFormatError(
                    f"kohya's key format has no key for {name}, of kind {layer.layer_name}: "
                    "programs that read it adapt Linear layers and convolutions. Write diffusers "
                    "or peft (which hold magnitudes on the output axis), or export a merged "
                    "checkpoint"
                )

    def encode(
        self, layers: Layers, metadata: AdapterMetadata, options: WriteOptions
    ) -> dict[str, EncodedFile]:
        return {KOHYA_FILE: kohya_file(layers, layers, metadata, options, "kohya")}

    def is_read_as_meant(
        self, layers: Layers, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> bool:
        """Magnitudes must lie along their axis, too; LoRA and DoRA layers may stand together."""
        if not self.finds_alpha(layers, specs, metadata):
            return False
        axes = {layer.norm_axis for layer in layers.values() if layer.magnitude is not None}
        along = int(axes == {"input"})
        shapes = [spec.shape for key, spec in specs.items() if key.endswith(".dora_scale")]
        return len(axes) > 1 or all(
            len(shape) > 1 and shape[along] == math.prod(shape) for shape in shapes
        )

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        if norm_axis:
            return dict(self.verdicts.get(f"kohya DoRA, {norm_axis} axis", {}))
        tools = dict(self.verdicts["kohya LoRA"])
        tools["diffusers"] = _lora_in_diffusers(layers)
        if outside := _outside_of_blocks(layers):
            tools["sd-scripts"] = f"wrong: it leaves {some_layers(outside)} unchanged"
            if tools["diffusers"] == EXACT:
                tools["diffusers"] += (
                    f": in 0.42; 0.35 leaves {some_layers(outside)} unchanged, or refuses SDXL's"
                )
        return tools

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        if not norm_axis:
            return ["a plain LoRA: it has no magnitudes, which programs compute in several ways"]
        notes = []
        if norm_axis == "output":
            notes.append(
                "for web UIs export a merged checkpoint, or convert it to the one that you use "
                "(a1111, comfyui ...); for diffusers convert it to diffusers"
            )
        return [
            *notes,
            f"{BYPASS}: use its usual loader, or convert the adapter to lora or dense",
        ]


KOHYA = Kohya()
KOHYA_FILE = "adapter_kohya.safetensors"


def _lora_in_diffusers(layers: Layers) -> str:
    """The verdict on a kohya LoRA in Diffusers (0.42), which reads few text encoders whole.

    It keys the alphas of attention, and of a first text encoder, by names that no module has: they
    get the commonest alpha of their component.
    """
    lost: list[str] = []
    misread: list[str] = []
    for component in dict.fromkeys(name.partition(".")[0] for name in layers):
        part = {name: w for name, w in layers.items() if name.startswith(f"{component}.")}
        ((alpha, _),) = Counter(layer.alpha for layer in part.values()).most_common(1)
        misread += [n for n, w in part.items() if w.alpha != alpha and _ALPHA_IS_LOST.search(n)]
        if component == "unet":
            continue
        # It knows the old names, in which attention stands, by this layer's.
        has_output = any(name.endswith(".out_proj") for name in part)
        attention = [] if has_output else [name for name in part if ".self_attn." in name]
        if _is_refused(part, attention):
            return f"convert: it refuses such layers of the {component}; convert it to diffusers"
        lost += attention
    if lost:
        return f"wrong: it leaves {some_layers(lost)} unchanged; convert it to diffusers"
    if misread:
        what = f"{some_layers(misread)} another layer's alpha"
        return f"wrong: it gives {what}; convert it to kohya or diffusers"
    return EXACT


def _is_refused(encoder: Layers, lost: Sequence[str]) -> bool:
    """Return whether Diffusers stops at a text encoder: no name that it knows, or a missed rank."""
    ranks = Counter(w.rank for name, w in encoder.items() if ".encoder." in name).most_common(1)
    projections = {w.rank for name, w in encoder.items() if name.endswith(".text_projection")}
    missed = projections and projections != {rank for rank, _ in ranks}
    return bool(missed) or (bool(lost) and not any(".mlp." in name for name in encoder))


def _outside_of_blocks(layers: Iterable[str]) -> list[str]:
    """Layers beside the blocks of UNet and text encoders, where sd-scripts looks for none."""
    return [
        name
        for name in layers
        if name.removeprefix("unet.") in dict(TOP_MODULES) or name.endswith(".text_projection")
    ]


def kohya_file(
    layers: Layers, trained: Layers, metadata: AdapterMetadata, options: WriteOptions, target: str
) -> EncodedFile:
    """A file of kohya's names, with the hash by which A1111 and adapter managers know it.

    Args:
        layers: What it holds.
        trained: What its metadata tell of.
        metadata: What is known of the adapter.
        options: How to write it.
        target: What it is written for.
    """
    names = kohya_names(layers, metadata, options)
    tensors: dict[str, Tensor] = {}
    for name, layer in _for_other_programs(layers, options).items():
        tensors |= _tensors_of(names[name], layer, options)
    tensors |= options.bundled
    fields = kohya_metadata(trained, metadata, options, target)
    # Of its data alone.
    return EncodedFile.of(tensors, {**fields, "sshs_model_hash": data_hash(tensors)})


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
    names = {name: kohya_name(name, family, layout) for name in layers}
    if missing := [name for name, new in names.items() if new is None]:
        raise AdapterFormatError(f"modules without a name in the kohya format: {listing(missing)}")
    counts = Counter(names.values())
    if repeated := [name for name, new in names.items() if counts[new] > 1]:
        raise AdapterFormatError(
            f"modules that would share a name in the kohya format: {listing(repeated)}"
        )
    return {name: str(new) for name, new in names.items()}


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


def _tensors_of(prefix: str, layer: LayerWeights, options: WriteOptions) -> dict[str, Tensor]:
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
