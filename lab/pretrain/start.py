"""Start from a model that ships, rather than from random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.models.embedded import model_folder

if TYPE_CHECKING:
    from lab.pretrain.diffusion import Denoiser

_BEFORE = "before.json"


def prepare_to_go_on(name: str, work: Path) -> None:
    """Prepare a work folder with what a further training of a shipped model keeps.

    Args:
        name: of the model.
        work: folder; whatever was prepared in it before stays, so that a stopped training resumes.
    """
    folder = model_folder(name)
    for part in ("vae", "tokenizer"):
        shutil.copytree(folder / part, work / part, dirs_exist_ok=True)
    if not goes_on(work):
        shutil.copy(folder / "training.json", work / _BEFORE)


def goes_on(work: Path) -> bool:
    """Return whether a work folder was prepared to continue from a shipped model."""
    return (work / _BEFORE).is_file()


def facts_before(work: Path) -> Path:
    """Return the path of the facts about the training so far, in a folder that was prepared."""
    return work / _BEFORE


def fill_from_package(model: Denoiser, name: str) -> None:
    """Load the shipped UNet and text encoders into a model."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = model_folder(name)
    kinds = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for part, module in model.named_children():
        if part in kinds:
            module.load_state_dict(kinds[part].from_pretrained(folder / part).state_dict())
