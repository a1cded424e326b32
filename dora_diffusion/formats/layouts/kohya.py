"""Key format of kohya and LyCORIS: names, metadata and the standard ``dora_scale``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from statistics import mode

import torch
from torch import Tensor

from dora_diffusion.config.families import FAMILIES, Family, denoiser_family, guess_family
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.metadata import (
    OWN,
    UNET_LAYERS,
    AdapterMetadata,
    kohya_fields,
    own_fields,
)
from dora_diffusion.formats.files.stream import data_hash
from dora_diffusion.formats.layouts import BYPASS, FACTS, VERDICTS
from dora_diffusion.formats.layouts.layout import (
    EXACT,
    AdapterFormatError,
    AdapterLayout,
    EncodedFile,
    Fields,
    Key,
    Layers,
    Part,
    Specs,
    WriteOptions,
    by_component,
    denoiser_of,
    factors,
    norm_axes,
    some_layers,
    unit_scale,
    with_alpha,
)
from dora_diffusion.formats.names.kohya import KOHYA_PREFIXES, Resolve, is_kohya_name, kohya_name
from dora_diffusion.formats.names.modules import (
    NAMES,
    TOP_MODULES,
    USUAL_LAYOUT,
    UNetLayout,
    has_swapped_halves,
)
from dora_diffusion.numerics.weights import LayerWeights

_FORMS: dict[str, Part] = NAMES["kohya_forms"]
_OTHER_FORMS: dict[str, Part] = NAMES["other_forms"]
_OWN_PATH = re.compile(rf"(?:{'|'.join(KOHYA_PREFIXES)})[^.]+")
_ALPHA_IS_LOST = re.compile(r"^text_encoder\.|\.(?:attn[12]|self_attn)\.")


class Kohya(AdapterLayout):
    """Layout ``lora_unet_<module_with_underscores>.lora_down.weight``."""

    name = key_format = "kohya"
    file_name: str | None = "adapter_kohya.safetensors"

    def parse(self, key: str) -> Key | None:
        if not is_kohya_name(key):
            return None
        # Diffusers' converter writes keys such as `lora_unet_..._attn1.to_q.lora_magnitude_vector`.
        path, mark, name = key.partition(".lora_magnitude_vector")
        if mark:
            return Key(key, path, mark + name, "magnitude")
        for form, part in (_FORMS | _OTHER_FORMS).items():
            if key.endswith(form):
                return Key(key, key.removesuffix(form), form, part)
        return None

    def owns(self, key: Key) -> bool:
        return key.form in _FORMS and _OWN_PATH.fullmatch(key.path) is not None

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        is_standard = metadata.get(OWN + "target") not in ("comfyui", "comfyui_pair")
        return is_standard and super().matches(keys, metadata)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        # In OneTrainer the prefix is followed by a dot: `lora_unet.conv_in.alpha`.
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

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        is_flat = self.name == "kohya"
        return {self.name: encode_file(layers, layers, options, "kohya", is_flat=is_flat)}

    def is_read_as_meant(self, layers: Layers, specs: Specs, metadata: Fields) -> bool:
        """Check the shapes of magnitudes, too. LoRA and DoRA layers may be mixed."""
        if not self.finds_alpha(layers, specs, metadata):
            return False
        axes = norm_axes(layers.values())
        along = int(axes == {"input"})
        shapes = [spec.shape for key, spec in specs.items() if key.endswith(".dora_scale")]
        return len(axes) > 1 or all(
            len(shape) > 1 and shape[along] == math.prod(shape) for shape in shapes
        )

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        kind = f"kohya DoRA, {norm_axis} axis" if norm_axis else "kohya LoRA"
        if denoiser_of(layers) == "transformer":
            own = VERDICTS.get(f"{kind} of {denoiser_family(layers)}")
            return dict(own) if own else super().judge(layers, norm_axis, keys)
        if norm_axis:
            return dict(VERDICTS.get(kind, {}))
        tools = dict(VERDICTS["kohya LoRA"])
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
        notes.append(f"{BYPASS}: use its usual loader, or convert the adapter to lora or dense")
        return notes


def with_original_names(tools: dict[str, str], keys: Collection[str]) -> dict[str, str]:
    """Correct the verdict on Diffusers (0.42) if it does not know the names of a transformer."""
    family = denoiser_family(keys)
    facts = NAMES["transformers"][FAMILIES[family].code] if family else {}
    if not facts.get("others_by_original"):
        return tools
    is_refused = facts.get("diffusers_refuses") and any(key.endswith(".alpha") for key in keys)
    if is_refused and not all(key.startswith("lora_unet_") for key in keys):
        tools["diffusers"] = FACTS["words"]["refused"]
    elif any(key.endswith(".lora_down.weight") for key in keys):
        tools["diffusers"] = FACTS["words"]["finds_nothing"]
    elif any(key.endswith(".lora_A.weight") for key in keys):
        tools["diffusers"] = FACTS["words"]["unchecked"]
    return tools


def _lora_in_diffusers(layers: Layers) -> str:
    """Return the verdict on a kohya LoRA in Diffusers (0.42), which reads few text encoders whole.

    Diffusers stores the alphas of attention and of the first text encoder under names that no
    module has. These layers get the most frequent alpha of their component.
    """
    lost: list[str] = []
    misread: list[str] = []
    for component, selected in by_component(layers).items():
        alpha = mode(layer.alpha for layer in selected.values())
        misread += [n for n, w in selected.items() if w.alpha != alpha and _ALPHA_IS_LOST.search(n)]
        if component == "unet":
            continue
        # Diffusers detects the old names, which attention has, by this layer.
        has_output = any(name.endswith(".out_proj") for name in selected)
        attention = [] if has_output else [name for name in selected if ".self_attn." in name]
        if _is_refused(selected, attention):
            return f"convert: it refuses such layers of the {component}; convert it to diffusers"
        lost += attention
    if lost:
        return f"wrong: it leaves {some_layers(lost)} unchanged; convert it to diffusers"
    if misread:
        what = f"{some_layers(misread)} another layer's alpha"
        return f"wrong: it gives {what}; convert it to kohya or diffusers"
    return EXACT


def _is_refused(encoder: Layers, lost: Sequence[str]) -> bool:
    """Return whether Diffusers rejects a text encoder: no known names, or an unexpected rank."""
    ranks = Counter(w.rank for name, w in encoder.items() if ".encoder." in name).most_common(1)
    projections = {w.rank for name, w in encoder.items() if name.endswith(".text_projection")}
    missed = projections and projections != {rank for rank, _ in ranks}
    return bool(missed) or (bool(lost) and not any(".mlp." in name for name in encoder))


def _outside_of_blocks(layers: Iterable[str]) -> list[str]:
    """Return layers outside of UNet blocks and text-encoder layers, which sd-scripts ignores."""
    tops = tuple(f"unet.{name}" for name in TOP_MODULES)
    return [name for name in layers if name in tops or name.endswith(".text_projection")]


def encode_file(
    layers: Layers,
    trained: Layers,
    options: WriteOptions,
    target: str,
    *,
    is_flat: bool = False,
) -> EncodedFile:
    """Encode a file with kohya's names and the hash that A1111 and adapter managers use.

    Args:
        layers: Layers to write.
        trained: Layers that the metadata describe.
        options: Options for writing.
        target: Name of the target in the metadata.
        is_flat: Whether a transformer's original names are written as sd-scripts does.
    """
    names = kohya_names(layers, options)
    if is_flat:
        names = {name: _flat(path) for name, path in names.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in _for_other_programs(layers, options).items():
        if has_swapped_halves(name, names[name]):
            layer = layer.with_swapped_halves()
        down, up = factors(layer, options)
        alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        by_suffix = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
        if layer.magnitude is not None:
            # Not one-dimensional: the axis would be unknown, and ComfyUI would skip the layer.
            lead = (-1,) if layer.norm_axis == "output" else (1, -1)
            shape = (*lead, *[1] * (layer.down.ndim - len(lead)))
            by_suffix["dora_scale"] = layer.magnitude.detach().cpu().float().reshape(shape)
        tensors |= {f"{names[name]}.{suffix}": tensor for suffix, tensor in by_suffix.items()}
    tensors |= options.bundled
    fields = metadata_of(trained, options, target)
    # The hash includes only the data.
    return EncodedFile.of(tensors, {**fields, "sshs_model_hash": data_hash(tensors)})


def _flat(path: str) -> str:
    prefix, dot, original = path.partition("diffusion_model.")
    return path if prefix or not dot else "lora_unet_" + original.replace(".", "_")


def _for_other_programs(layers: Layers, options: WriteOptions) -> Layers:
    """Change alphas to values that all programs read correctly, and rescale ``B`` accordingly.

    All layers get the same alpha, since Diffusers uses the most frequent alpha of the file for
    attention of the UNet and for text encoders. Layers with magnitudes on the input axis get
    alpha = rank, since versions of A1111 differ in whether ``alpha / rank`` is applied before the
    norm or to the whole change.
    """
    alpha = _one_alpha([w for w in layers.values() if not on_input(w)], options.dtype)
    return {
        name: unit_scale(layer) if on_input(layer) else with_alpha(layer, alpha)
        for name, layer in layers.items()
    }


def on_input(layer: LayerWeights) -> bool:
    return layer.magnitude is not None and layer.norm_axis == "input"


def needs_compensation(layers: Layers) -> bool:
    """Return whether ComfyUI would compute layers incorrectly from a standard kohya file."""
    return "output" in norm_axes(layers.values())


def _one_alpha(layers: Sequence[LayerWeights], dtype: torch.dtype | None) -> float:
    """Return the smallest alpha of all layers, so that values of ``B`` increase, not decrease.

    Half precision loses small values first. The alpha is larger if the largest value would come
    within a factor of 2 of the dtype's limit.
    """
    alphas = {abs(layer.alpha) for layer in layers}
    if len(alphas) < 2:
        return alphas.pop() if alphas else 1.0
    largest = max(abs(layer.alpha) * layer.up.abs().max().item() for layer in layers)
    return max(min(alphas), 2 * largest / torch.finfo(dtype or layers[0].up.dtype).max)


def kohya_names(layers: Layers, options: WriteOptions) -> dict[str, str]:
    """Return the kohya names of modules, by canonical name.

    Raises:
        AdapterFormatError: If the family is unknown, or the names are not one-to-one.
    """
    family = _known_family(layers, options.metadata)
    trained = UNetLayout.from_text(options.metadata.extra.get(UNET_LAYERS, ""))
    layout = options.unet_layout or trained or USUAL_LAYOUT
    names = {name: kohya_name(name, family, layout) for name in layers}
    missing = [name for name, new in names.items() if new is None]
    if missing:
        raise AdapterFormatError(
            f"modules without a name in the kohya format: {listing(missing)}; write diffusers or "
            "peft, or export a merged model"
        )
    counts = Counter(names.values())
    if repeated := [name for name, new in names.items() if counts[new] > 1]:
        raise AdapterFormatError(
            f"modules that would share a name in the kohya format: {listing(repeated)}"
        )
    return {name: str(new) for name, new in names.items()}


def metadata_of(layers: Layers, options: WriteOptions, target: str) -> dict[str, str]:
    """Return the metadata of a file in kohya's key format."""
    metadata, family = options.metadata, _known_family(layers, options.metadata)
    stored = _for_other_programs(layers, options)
    # Layers of an approximation were not trained and have only the alpha of the file.
    fields = own_fields(metadata, stored if "approximation" in metadata.extra else layers, target)
    fields |= kohya_fields(metadata, stored, family, options.title)
    if options.unet_layout and family.kohya_names_original_blocks:
        fields[OWN + UNET_LAYERS] = options.unet_layout.text()
    return fields


def _known_family(layers: Layers, metadata: AdapterMetadata) -> Family:
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    name = metadata.family or guess_family(shapes)
    if not name:
        *first, last = FAMILIES
        raise AdapterFormatError(
            "kohya names differ between model families, and this adapter's family is unknown; "
            f"say which it is ({', '.join(first)} or {last}) with --family; in Python with "
            "metadata=AdapterMetadata(family=NAME) of dora_diffusion.formats.adapter.metadata"
        )
    return FAMILIES[name]


KOHYA = Kohya()
