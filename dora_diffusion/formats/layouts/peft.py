"""PEFT's folder per component: ``adapter_model.safetensors`` with ``adapter_config.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.config.families import COMPONENTS
from dora_diffusion.formats.adapter.alpha import json_object, refuse_changed_base
from dora_diffusion.formats.adapter.metadata import OWN, AdapterMetadata, own_fields, without_path
from dora_diffusion.formats.layouts.compatibility import EXACT, NOT_CHECKED, NOT_FOR_IT, table
from dora_diffusion.formats.layouts.diffusers import (
    EMBEDDING_FORMS,
    PEFT_FORMS,
    PEFT_PREFIX,
    Dotted,
    peft_tensors,
)
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    EncodedFile,
    Key,
    Layers,
    WriteOptions,
)
from dora_diffusion.formats.names.kohya import component_of
from dora_diffusion.formats.names.modules import installed_path, split_component
from dora_diffusion.numerics.weights import LayerWeights

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


class Peft(Dotted):
    """``base_model.model.<module>.lora_A.weight``."""

    name = key_format = "peft"
    file_name = None
    verdicts = table(
        {
            "peft DoRA": (NOT_FOR_IT, EXACT, NOT_FOR_IT),
            "peft LoRA": (NOT_FOR_IT, EXACT, NOT_CHECKED),
        }
    )

    def owns(self, key: Key) -> bool:
        forms = (*PEFT_FORMS, *EMBEDDING_FORMS, ".lora_magnitude_vector")
        return key.path.startswith(PEFT_PREFIX) and key.form in forms

    def finds_alpha(self, *of_file: object) -> bool:
        return True  # in its config

    def encode(
        self, layers: Layers, metadata: AdapterMetadata, options: WriteOptions
    ) -> dict[str, EncodedFile]:
        """A folder per component, each for ``PeftModel.from_pretrained(component, folder)``."""
        files: dict[str, EncodedFile] = {}
        components: dict[str, dict[str, LayerWeights]] = {}
        for name, layer in layers.items():
            components.setdefault(split_component(name)[0], {})[name] = layer
        for component, part in components.items():
            # Only CLIPTextModel was flattened; text_encoder_2 is a CLIPTextModelWithProjection.
            paths = {name: installed_path(name, flat=component == "text_encoder") for name in part}
            tensors: dict[str, Tensor] = {}
            for name, layer in part.items():
                tensors |= peft_tensors(PEFT_PREFIX + paths[name], layer, options, "")
            fields = {"format": "pt", **own_fields(metadata, part, self.name)}
            fields[OWN + "component"] = component
            files[f"{component}/{PEFT_FILE}"] = EncodedFile.of(tensors, fields)
            config = _config_of({paths[name]: layer for name, layer in part.items()}, metadata)
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            files[f"{component}/{PEFT_CONFIG}"] = EncodedFile(text=text)
        return files


PEFT = Peft()


def _config_of(layers: Layers, metadata: AdapterMetadata) -> dict[str, object]:
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


def peft_folders(path: Path) -> list[Path]:
    """The PEFT folders of one adapter: the path itself, or those of its components in it."""
    candidates = [path, *(path / component for component in COMPONENTS)]
    return [folder for folder in candidates if (folder / PEFT_CONFIG).is_file()]


def peft_config(folder: Path) -> dict[str, Any]:
    """The config of a PEFT folder.

    Raises:
        AdapterFormatError: If it is damaged, or not of a LoRA or DoRA that fits released models.
    """
    path = folder / PEFT_CONFIG
    try:
        config = json_object(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{path} is not a text file") from error
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{folder} holds {config.get('peft_type')}, not a LoRA")
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
    """Component of a PEFT folder: as we stamped it, as the folder is called, or as its keys look.

    Raises:
        AdapterFormatError: If none of these tells.
    """
    for name in (stamped, folder_name):
        if name in COMPONENTS:
            return name
    guesses = {component_of(key.removeprefix(PEFT_PREFIX)) for key in keys}
    guess = guesses.pop() if len(guesses) == 1 else None
    if guess is None:
        raise AdapterFormatError("its PEFT keys belong neither to a UNet nor to a text encoder")
    return guess
