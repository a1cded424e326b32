"""The Stable Diffusion families as data: what differs between them, and how to tell them apart."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dora_diffusion.formats.names.modules import FAMILY_TITLES

HiddenState = Literal["last", "penultimate"]


class UnsupportedModelError(ValueError):
    """The model exists, but it is not one of the supported Stable Diffusion families."""


@dataclass(frozen=True)
class Family:
    """Facts of one model family.

    Attributes:
        name: "sd1", "sd2" or "sdxl", as stored in adapter files.
        title: The name that people use.
        hidden_states: Per text encoder, the state that conditions the UNet: "last" (after the final
            layer norm) or "penultimate" (before it, without a norm).
        has_pooled: The last text encoder's projected pooled output conditions the UNet too.
        has_time_ids: Original size, crop and target size condition the UNet.
        default_resolution: Side in pixels that the released models were trained at.
        default_steps: Optimizer steps of a run that does not say how many.
        vae_wants_float32: The released autoencoder overflows in float16.
        pipeline_class: Name of the diffusers text-to-image pipeline.
        checkpoint_key: A tensor name that only this family's single-file checkpoints hold.
    """

    name: str
    title: str
    hidden_states: tuple[HiddenState, ...]
    has_pooled: bool
    has_time_ids: bool
    default_resolution: int
    default_steps: int
    vae_wants_float32: bool
    pipeline_class: str
    checkpoint_key: str

    @property
    def num_text_encoders(self) -> int:
        """Number of text encoders."""
        return len(self.hidden_states)

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Component names of the text encoders, in order."""
        return ("text_encoder", "text_encoder_2")[: self.num_text_encoders]

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """Component names of the tokenizers, in order."""
        return ("tokenizer", "tokenizer_2")[: self.num_text_encoders]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="sd1",
            title=FAMILY_TITLES["sd1"],
            hidden_states=("last",),
            has_pooled=False,
            has_time_ids=False,
            default_resolution=512,
            default_steps=800,
            vae_wants_float32=False,
            pipeline_class="StableDiffusionPipeline",
            checkpoint_key="cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ),
        # The diffusers release of SD2 already drops the last encoder layer (23 of 24), so its
        # "last" state is the penultimate one of the original model.
        Family(
            name="sd2",
            title=FAMILY_TITLES["sd2"],
            hidden_states=("last",),
            has_pooled=False,
            has_time_ids=False,
            default_resolution=768,
            default_steps=800,
            vae_wants_float32=False,
            pipeline_class="StableDiffusionPipeline",
            checkpoint_key="cond_stage_model.model.ln_final.weight",
        ),
        # SDXL reads the penultimate layer of both encoders.
        Family(
            name="sdxl",
            title=FAMILY_TITLES["sdxl"],
            hidden_states=("penultimate", "penultimate"),
            has_pooled=True,
            has_time_ids=True,
            default_resolution=1024,
            default_steps=1000,
            vae_wants_float32=True,
            pipeline_class="StableDiffusionXLPipeline",
            checkpoint_key="conditioner.embedders.1.model.ln_final.weight",
        ),
    )
}


def detect_family(
    model_index: Mapping[str, Any], unet_config: Mapping[str, Any], name: str = "the model"
) -> Family:
    """Tell the family from a pipeline's ``model_index.json`` and its UNet's ``config.json``.

    The decision rests on what the components are, never on the model's name.

    Raises:
        UnsupportedModelError: If it is another kind of model, with what was found.
    """
    kinds = {key: value[1] for key, value in model_index.items() if isinstance(value, list)}
    text_encoders = [kinds.get("text_encoder"), kinds.get("text_encoder_2")]
    if kinds.get("unet") != "UNet2DConditionModel" or kinds.get("vae") != "AutoencoderKL":
        raise UnsupportedModelError(_unsupported(name, model_index))
    if unet_config.get("addition_embed_type") == "text_time":
        # The SDXL refiner has only the second encoder, and other size conditioning.
        if text_encoders == ["CLIPTextModel", "CLIPTextModelWithProjection"]:
            return FAMILIES["sdxl"]
    elif text_encoders == ["CLIPTextModel", None]:
        return FAMILIES["sd2" if unet_config.get("use_linear_projection") else "sd1"]
    raise UnsupportedModelError(_unsupported(name, model_index))


def _unsupported(name: str, model_index: Mapping[str, Any]) -> str:
    titles = ", ".join(family.title for family in FAMILIES.values())
    found = model_index.get("_class_name", "a pipeline without a class name")
    return f"{name} is a {found} of a kind that is not supported; use a base model of {titles}"


def detect_folder_family(folder: Path) -> Family:
    """Tell the family of a diffusers pipeline folder.

    Raises:
        UnsupportedModelError: If it is another kind of model.
        OSError: If a configuration file is missing.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    unet_config = folder / "unet" / "config.json"
    config = json.loads(unet_config.read_text(encoding="utf-8")) if unet_config.is_file() else {}
    return detect_family(index, config, str(folder))


def detect_checkpoint_family(keys: Collection[str], name: str = "the checkpoint") -> Family:
    """Tell the family of a single-file checkpoint from its tensor names.

    Raises:
        UnsupportedModelError: If no family's marker is among them.
    """
    from dora_diffusion.formats.checkpoint.file import standard_key  # imports torch

    names = {standard_key(key) for key in keys}
    for family in FAMILIES.values():
        if family.checkpoint_key in names:
            return family
    titles = ", ".join(family.title for family in FAMILIES.values())
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {titles}: its text encoder was not found among its "
        f"{len(keys)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )
