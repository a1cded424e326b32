"""The folders that PEFT keeps adapters in: where they are, and their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_diffusion.families import COMPONENTS
from dora_diffusion.formats.adapter.alpha import json_object, refuse_changed_base
from dora_diffusion.formats.adapter.keys import AdapterFormatError
from dora_diffusion.formats.adapter.targets.peft import PEFT_CONFIG


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
