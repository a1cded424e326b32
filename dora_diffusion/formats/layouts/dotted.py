"""Layouts with dots in their keys: Diffusers, PEFT and OneTrainer.

PEFT: ``base_model.model.<module>.lora_A.weight``, for an Embedding ``<module>.lora_embedding_A``.
Diffusers, new and old: ``unet.<module>.lora_A.weight``, ``.lora.down.weight``,
``processor.to_q_lora.down.weight``, ``text_encoder.<module>.lora_linear_layer.down.weight``.
OneTrainer: original blocks with dots, with or without ``unet.`` or ``diffusion_model.``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import mode
from typing import Any, cast

from torch import Tensor
from torch.nn.functional import pad

from dora_diffusion.config.families import COMPONENTS, DENOISERS, FAMILIES
from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.alpha import LOKR, json_object, refuse_changed_base
from dora_diffusion.formats.adapter.metadata import OWN, own_fields, without_path
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    EncodedFile,
    Fields,
    Key,
    Layers,
    Part,
    WriteOptions,
    by_component,
    factors,
    is_mixed,
    unit_scale,
)
from dora_diffusion.formats.names.kohya import Resolve, component_of, is_kohya_name, is_sgm_path
from dora_diffusion.formats.names.modules import (
    canonical,
    installed_path,
    split_prefix,
)
from dora_diffusion.numerics.weights import LayerWeights

PEFT_PREFIX = "base_model.model."
# The optional name in `.lora_A.default.weight` is that of the PEFT adapter.
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
# Attention processors of early Diffusers used the UNet's names for text-encoder projections.
_OLD_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse_dotted(text: str) -> Key | None:
    """Parse a key with dots."""
    match = None if is_kohya_name(text) else _KEY.fullmatch(text)
    if match is None:
        return None
    word = match[match.lastindex or 0]
    part = cast(Part, _FACTORS.get(word, word))
    return Key(text, match[1], text.removeprefix(match[1]), part)


def is_processor(key: Key) -> bool:
    """Return whether a key is a factor in an attention processor of early Diffusers."""
    return key.form in PROCESSOR_FORMS and key.path.split(".")[-2:-1] == ["processor"]


def is_old_form(text: str) -> bool:
    """Return whether a key has the form of Diffusers before PEFT."""
    key = parse_dotted(text)
    return key is not None and (key.form in EARLY_FORMS + LINEAR_FORMS or is_processor(key))


def mixes_forms(keys: Iterable[str]) -> bool:
    """Return whether some keys have the form of PEFT and others that of old Diffusers."""
    keys = list(keys)
    return any(map(is_old_form, keys)) and any(key.endswith(PEFT_FORMS) for key in keys)


class Dotted(AdapterLayout):
    """Base class of layouts with dots in their keys."""

    def parse(self, key: str) -> Key | None:
        return parse_dotted(key)

    def module(self, key: Key, resolve: Resolve, component: str | None) -> str | None:
        stated, path = split_prefix(key.path.removeprefix(PEFT_PREFIX))
        path = f"{path}.".replace(".processor.", ".")[:-1]
        if stated == "unet" and component_of(path) == "transformer":
            stated = "transformer"  # `diffusion_model.` is the prefix of both.
        component = stated or component or component_of(path)
        if component == "transformer":
            path = resolve.paths.get(path, path)
        if component == "unet" and is_sgm_path(path):
            return resolve("lora_unet_" + path.replace(".", "_"))
        return None if component is None else canonical(component, _modern_path(path, component))

    def check(self, layers: Layers) -> None:
        for name, layer in layers.items():
            if layer.magnitude is not None and layer.norm_axis == "input":
                raise AdapterFormatError(
                    f"the {self.name} format cannot hold {name}: its magnitude runs along the "
                    "input axis, and PEFT and diffusers only know one magnitude per output. Write "
                    "the kohya format, export a merged checkpoint (no adapter in it), or convert "
                    "to a plain LoRA (lora-diffusers, an approximation)"
                )
            if layer.groups > 1:
                raise AdapterFormatError(
                    f"the {self.name} format cannot hold {name}: of a convolution with groups, "
                    "PEFT's A sees the inputs of all groups, which fits no such weight. Write the "
                    "kohya format, or export a merged checkpoint"
                )
        if mixed := [name for name, group in by_component(layers).items() if is_mixed(group)]:
            raise AdapterFormatError(
                f"the {self.name} format cannot hold LoRA and DoRA layers in one component "
                f"({listing(mixed)}): PEFT makes all of them DoRA. Write the kohya format instead"
            )

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        if not norm_axis:
            return ["a plain LoRA: it has no magnitudes, which programs compute in several ways"]
        return ["for web UIs export a merged checkpoint, or convert it to the one that you use"]


def _modern_path(path: str, component: str) -> str:
    parent, _, leaf = path.rpartition(".")
    if component not in DENOISERS and leaf in _OLD_TEXT_LEAVES:
        return f"{parent}.{_OLD_TEXT_LEAVES[leaf]}"
    # The first attention processors dropped the index of `to_out.0`.
    return f"{path}.0" if component == "unet" and leaf == "to_out" else path


def peft_tensors(
    prefix: str, layer: LayerWeights, options: WriteOptions, magnitude_suffix: str
) -> dict[str, Tensor]:
    """Return the tensors of a layer with PEFT's names."""
    down, up = factors(layer, options)
    # The factors of an Embedding are parameters, not modules, and have no `.weight`.
    forms = EMBEDDING_FORMS if layer.kind == "embedding" else PEFT_FORMS
    tensors = {prefix + form: tensor for form, tensor in zip(forms, (down, up), strict=True)}
    if layer.magnitude is not None:
        ones = [1] * (layer.down.ndim - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        magnitude = layer.magnitude.float().reshape(shape)
        tensors[f"{prefix}.lora_magnitude_vector{magnitude_suffix}"] = magnitude
    return tensors


_UNET = re.compile(
    r"unet\.(?:conv_in|conv_out|time_embedding|add_embedding|mid_block|(?:down|up)_blocks)\b.*"
)
_MAGNITUDE = ".lora_magnitude_vector"
# Text encoders: Diffusers ignores a magnitude without `.weight`.
_TEXT_FORMS = (*PEFT_FORMS, *EMBEDDING_FORMS, *LINEAR_FORMS, f"{_MAGNITUDE}.weight")
_TRANSFORMER = (
    "transformer.",
    *(f"{e.component}." for f in FAMILIES.values() for e in f.text_encoders if e.is_in_denoiser),
)
_UNET_FORMS = (*PEFT_FORMS, *EARLY_FORMS, _MAGNITUDE, f"{_MAGNITUDE}.weight")


class Diffusers(Dotted):
    """Layout ``unet.<module>.lora_A.weight``, with the names of releases before PEFT."""

    name = key_format = "diffusers"
    file_name = "pytorch_lora_weights.safetensors"

    def owns(self, key: Key) -> bool:
        # Diffusers loads nothing for UNet keys without the component, and ignores `.alpha`,
        # `dora_scale` and a text encoder's magnitude without `.weight`.
        if key.path.startswith(("text_encoder.", "text_encoder_2.")):
            return key.form in _TEXT_FORMS
        if key.path.startswith(_TRANSFORMER):
            return key.form in (*PEFT_FORMS, _MAGNITUDE, f"{_MAGNITUDE}.weight")
        known = key.form in _UNET_FORMS or is_processor(key)
        return known and _UNET.fullmatch(key.path) is not None

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        for component in COMPONENTS:
            selected = [key for key in keys if key.startswith(f"{component}.")]
            # Diffusers does not recognize an adapter of Embeddings only.
            has_embedding = any(".lora_embedding_" in k for k in selected)
            has_other = any(".lora_A." in k for k in selected)
            if mixes_forms(selected) or (has_embedding and not has_other):
                return False
        return super().matches(keys, metadata)

    def check(self, layers: Layers) -> None:
        super().check(layers)
        for group in by_component(layers).values():
            if all(layer.kind == "embedding" for layer in group.values()):
                raise AdapterFormatError(
                    f"the diffusers format cannot hold {next(iter(group))} alone: Diffusers does "
                    "not take the keys of an Embedding for an adapter's unless another layer of "
                    "its component is adapted too. Adapt one, write the peft format, or export a "
                    "merged checkpoint"
                )

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        """Encode a file that every version of Diffusers loads exactly.

        The scale is multiplied into ``lora_B``, since Diffusers uses alpha = rank without
        ``lora_adapter_metadata``, and versions differ in the metadata that they accept. Layers of
        one component are padded with zeros to the same rank, since older versions scale all layers
        by the rank of one.
        """
        tensors: dict[str, Tensor] = {}
        for group in by_component(layers).values():
            rank = max(layer.rank for layer in group.values())
            for name, layer in group.items():
                padded = unit_scale(layer)
                if extra := rank - layer.rank:
                    down = pad(padded.down, (0, 0) * (layer.down.ndim - 1) + (0, extra))
                    up = pad(padded.up, (0, 0) * (layer.up.ndim - 2) + (0, extra))
                    padded = dataclasses.replace(padded, down=down, up=up, alpha=float(rank))
                tensors |= peft_tensors(name, padded, options, ".weight")
        fields = {"format": "pt", **own_fields(options.metadata, layers, self.name)}
        return {self.file_name: EncodedFile.of(tensors, fields)}


_PROCESSOR_PATH = re.compile(
    r"(?:mid_block|(?:down|up)_blocks)\b.*\.attn[12]\.processor\.to_(?:q|k|v|out)"
)


class AttnProcs(Dotted):
    """Layout ``down_blocks...attn1.processor.to_q_lora.down.weight``."""

    name = key_format = "attn_procs"
    advice = AdapterLayout.advice

    def owns(self, key: Key) -> bool:
        return key.form in PROCESSOR_FORMS and _PROCESSOR_PATH.fullmatch(key.path) is not None


_ENCODERS = ("clip_l.", "clip_g.", "text_encoders.clip_l.", "text_encoders.clip_g.")
_ONETRAINER_FORMS = (*PEFT_FORMS, ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")


class OneTrainer(Dotted):
    """Layout ``clip_l.<module>.lora_down.weight``, ``unet.input_blocks.1.0.lora_down.weight``."""

    name = "onetrainer"
    advice = AdapterLayout.advice

    def owns(self, key: Key) -> bool:
        is_its = key.path.startswith(_ENCODERS) or is_sgm_path(split_prefix(key.path)[1])
        return is_its and key.form in _ONETRAINER_FORMS


PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


class Peft(Dotted):
    """Layout ``base_model.model.<module>.lora_A.weight``."""

    name = key_format = "peft"
    file_name = None

    def owns(self, key: Key) -> bool:
        forms = (*PEFT_FORMS, *EMBEDDING_FORMS, ".lora_magnitude_vector")
        return key.path.startswith(PEFT_PREFIX) and key.form in forms

    def finds_alpha(self, *of_file: object) -> bool:
        return True  # The config file has the alpha.

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        """Encode a folder per component, for ``PeftModel.from_pretrained(component, folder)``."""
        files: dict[str, EncodedFile] = {}
        for component, selected in by_component(layers).items():
            # Transformers flattened CLIPTextModel, but not CLIPTextModelWithProjection
            # (text_encoder_2).
            flat = component == "text_encoder"
            paths = {name: installed_path(name, flat=flat) for name in selected}
            tensors: dict[str, Tensor] = {}
            for name, layer in selected.items():
                tensors |= peft_tensors(PEFT_PREFIX + paths[name], layer, options, "")
            fields = {"format": "pt", **own_fields(options.metadata, selected, self.name)}
            fields[OWN + "component"] = component
            files[f"{component}/{PEFT_FILE}"] = EncodedFile.of(tensors, fields)
            named = {paths[name]: layer for name, layer in selected.items()}
            config = _config_of(named, without_path(options.metadata.base_model))
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            files[f"{component}/{PEFT_CONFIG}"] = EncodedFile(text=text)
        return files


def _config_of(layers: Layers, base: str) -> dict[str, object]:
    rank = mode(layer.rank for layer in layers.values())
    alpha = mode(layer.alpha for layer in layers.values())
    # Fields of all PEFT versions with DoRA, since older versions reject unknown fields.
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
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


def peft_folders(path: Path) -> list[Path]:
    """Return the PEFT folders of an adapter: the path itself, or its folders of components."""
    candidates = [path, *(path / component for component in COMPONENTS)]
    return [folder for folder in candidates if (folder / PEFT_CONFIG).is_file()]


def peft_config(folder: Path) -> dict[str, Any]:
    """Read the config of a PEFT folder.

    Raises:
        AdapterFormatError: If it is damaged, not a LoRA, DoRA or LoKr, or for a changed base model.
    """
    path = folder / PEFT_CONFIG
    try:
        config = json_object(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{path} is not a text file") from error
    if config.get("peft_type") not in ("LORA", LOKR):
        raise AdapterFormatError(f"{folder} holds {config.get('peft_type')}, not a LoRA")
    if config["peft_type"] == LOKR and "alpha" in config:
        config["lora_alpha"] = config["alpha"]
    try:
        refuse_changed_base(config.get("init_lora_weights"))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{folder}: {error}") from error
    if whole := config.get("modules_to_save"):
        raise AdapterFormatError(
            f"{folder}: it also holds whole trained modules (modules_to_save: {whole}), "
            "which no LoRA or DoRA file can; merge it with PEFT (merge_and_unload) and use that "
            "model, or train it again without them"
        )
    return config


def peft_component(keys: list[str], folder_name: str, stamped: str) -> str:
    """Return the component of a PEFT folder, by our metadata, the folder's name or its keys.

    Raises:
        AdapterFormatError: If the component is unknown.
    """
    for name in (stamped, folder_name):
        if name in COMPONENTS:
            return name
    guesses = {component_of(key.removeprefix(PEFT_PREFIX)) for key in keys}
    guess = guesses.pop() if len(guesses) == 1 else None
    if guess is None:
        raise AdapterFormatError("its PEFT keys belong neither to a UNet nor to a text encoder")
    return guess


DIFFUSERS, PEFT, ATTN_PROCS, ONETRAINER = Diffusers(), Peft(), AttnProcs(), OneTrainer()
