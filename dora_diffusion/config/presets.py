"""Presets: named sets of defaults, each of which a run may override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_diffusion.config.families import Family


@dataclass(frozen=True)
class Preset:
    """Named settings of a run; all others have their default.

    Attributes:
        about: Purpose, the same for every model.
        measured: Evidence for it: models and subjects of measurements, if there are any.
        steps: Optimizer steps, as a factor of the family's default.
        embedded_steps: Optimizer steps on an embedded model.
        is_of_one: True: for a single photo; False: for several; None: for any number.
        settings: Settings for every model.
        released: Further settings for models that are not embedded.
        embedded: Further settings for embedded models, over `EMBEDDED`.
        label: Label in the app, which tells what the preset does; empty: its name.
    """

    about: str
    measured: str
    steps: float
    embedded_steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    released: Mapping[str, Any] = field(default_factory=dict)
    embedded: Mapping[str, Any] = field(default_factory=dict)
    is_of_one: bool | None = False
    label: str = ""

    def photos_advice(self, count: int) -> str:
        """Return advice if the preset does not suit the number of photos; else empty."""
        if self.is_of_one is None or (count == 1) is self.is_of_one or not count:
            return ""
        if self.is_of_one:
            return (
                f"{count} photos: this preset is for a single one and stops early; balanced, "
                "object, pet or face suit several"
            )
        return "1 photo: this preset is for several; one-photo has half the steps, for a single one"


# Measured on tiny-sd and its twin (lab/measurements/fast.md): other models have other rates.
_FAST: Mapping[str, Any] = {
    "targets": ["up_blocks.*"], "learning_rate": 5e-3, "lr_scheduler": "constant",
    "lr_warmup_steps": 3, "ema_decay": 0.99, "train_batch_size": 10,
    "with_prior_preservation": True,
}  # fmt: skip
_WORD: Mapping[str, Any] = {
    "token": "<sks>", "train_text_encoder_ti": True, "num_new_tokens_per_abstraction": 1,
    "initializer_concept": ["sks"],
}  # fmt: skip
_PRACTICE = "Published practice for DreamBooth with LoRA, not measured here."
_TINY = (
    "On an embedded model, measured on tiny-sd and a twin that predicts the noise; not on others."
)
PRESETS: Mapping[str, Preset] = {
    "fast": Preset("Fewer steps than balanced.", _TINY, 0.5, 50, embedded=_FAST),
    "fast-word": Preset(
        "Fewer steps than balanced, and the trigger word is trained too: a new word of one "
        "vector, which starts from sks.",
        f"{_TINY} On the twin, the word gains nothing, but one of eight trainings learned little.",
        0.5, 50, _WORD, embedded={**_FAST, "embedding_lr": 1e-2}, label="Fast, with a trained word",
    ),
    "balanced": Preset(
        "The usual number of steps, for any subject.", _PRACTICE, 1, 300,
        released={"with_prior_preservation": True},
    ),
    "quality": Preset(
        "More steps than balanced.", _PRACTICE, 1.5, 600,
        released={"with_prior_preservation": True, "rank": 16},
    ),
    "style": Preset(
        "Drawings or an artist's look, from images with captions.",
        "Measured on tiny-sd with 20 drawings; not on real weights.", 1.5, 400,
        {"token": "", "aspect_ratio_buckets": True, "caption_dropout": 0.05},
    ),
    "slider": Preset(
        "More or less of something, from prompts without images.",
        "Measured on tiny-sd; not on real weights.", 0.5, 100,
        {"teach": "slider", "method": "lora"}, is_of_one=None, label="Slider, from words alone",
    ),
    "object": Preset(
        "A thing or a product.", _PRACTICE, 0.75, 300,
    ),
    "pet": Preset(
        "An animal.", _PRACTICE, 1, 300,
        released={"with_prior_preservation": True, "random_flip": True},
    ),
    "face": Preset(
        "A person: more steps than balanced.", _PRACTICE, 1.5, 600,
        released={
            "rank": 16, "train_text_encoder": True, "with_prior_preservation": True,
            "prior_preservation_mode": "images", "num_class_images": 200,
        },
    ),
    "one-photo": Preset(
        "A single photo: half the steps. Choose the earliest checkpoint that resembles it.",
        "Measured on tiny-sd: one photo needed about as many steps as five, but changed other "
        "images more.", 0.5, 150,
        released={"with_prior_preservation": True, "random_flip": True}, is_of_one=True,
    ),
}  # fmt: skip
"""Presets, by the name for ``--preset``."""
# The embedded models are small: they take larger steps (as in samples/*/config.yaml).
EMBEDDED: Mapping[str, Any] = {
    "learning_rate": 2e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 10, "conv_rank": 8,
    "train_batch_size": 5, "validation_guidance_scale": 3.5, "validation_steps": 50,
    "checkpointing_steps": 50,
}  # fmt: skip


def preset_settings(name: str, family: Family, *, is_embedded: bool = False) -> dict[str, Any]:
    """Settings of a preset that differ from the defaults.

    Args:
        name: A key of `PRESETS`.
        family: Family of the base model.
        is_embedded: Whether the base model is one of this package.
    """
    preset = PRESETS[name]
    if is_embedded:
        values = {**EMBEDDED, **preset.settings, **preset.embedded}
        return {**values, "max_train_steps": preset.embedded_steps}
    steps = round(preset.steps * family.default_steps)
    released = {n: value for n, value in preset.released.items() if n not in family.refused}
    return {**family.defaults, **preset.settings, **released, "max_train_steps": steps}


def preset_advice(name: str, family: Family) -> str:
    """Return advice if presets are not for models of a family; else empty.

    Example:
        >>> from dora_diffusion.config.families import FAMILIES
        >>> preset_advice("fast", FAMILIES["z-image"])
        'preset fast was made for Stable Diffusion: its settings were not tried on Z-Image'
    """
    if family.has_unet:
        return ""
    return (
        f"preset {name} was made for Stable Diffusion: its settings were not tried on "
        f"{family.title}"
    )
