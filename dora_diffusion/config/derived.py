"""Defaults that follow from other settings, and the settings of a run as they were used."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.config.checks import ConfigError
from dora_diffusion.config.train import TrainConfig, settings

# A class word ends where the prompt continues with where the subject is or how it is drawn.
_NEXT_PHRASE = re.compile(
    r"[,.;:()]|\b(?:on|in|at|with|by|under|over|near|against|wearing|from|and|of|beside)\b.*", re.I
)


def class_word_in(prompt: str, token: str) -> str:
    """The words after the token: ``"a photo of a sks robot toy on grass"`` -> ``"robot toy"``."""
    if not token:
        return ""
    _, _, rest = prompt.lower().partition(token.lower())
    return _NEXT_PHRASE.split(rest, maxsplit=1)[0].strip()


def _class_word(config: TrainConfig) -> str | None:
    return class_word_in(config.instance_prompt or "", config.token.strip()) or None


def _validation_prompt(config: TrainConfig) -> list[str]:
    is_used = config.instance_prompt and config.num_validation_images
    return [config.instance_prompt] if is_used and config.instance_prompt else []


def _class_data_dir(config: TrainConfig) -> str | None:
    is_used = config.with_prior_preservation and not config.is_image_free
    return str(Path(config.output_dir) / "class_images") if is_used else None


def _validation_steps(config: TrainConfig) -> int | None:
    return 200 if config.num_validation_images and not config.validation_epochs else None


DERIVED: Mapping[str, Callable[[TrainConfig], Any]] = {
    "learning_rate": lambda config: config.usual_lr,
    "lora_alpha": lambda config: None if config.direction == "vera" else float(config.rank),
    "conv_alpha": lambda config: None if config.direction == "vera" else float(config.conv_rank),
    "class_word": _class_word,
    "validation_prompt": _validation_prompt,
    "validation_steps": _validation_steps,
    # A checkpoint of a whole model takes gigabytes.
    "checkpointing_steps": lambda config: 500 if config.is_full else 100,
    "class_data_dir": _class_data_dir,
    "adam_weight_decay_text_encoder": lambda config: (
        config.adam_weight_decay if config.train_text_encoder else None
    ),
}
"""Setting -> its value where none is given, from the others."""


def resolve(
    config: TrainConfig,
    *,
    resolution: int,
    total_steps: int,
    steps_per_epoch: int,
    mixed_precision: str,
) -> TrainConfig:
    """The settings of a run as they are used: defaults that follow from something, written out.

    Args:
        config: The settings as they were given.
        resolution: The size that is trained at.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps per epoch, rounded up.
        mixed_precision: What ``auto`` means on this machine.
    """
    values = {
        name: value
        for name, derive in DERIVED.items()
        if getattr(config, name) in (None, []) and (value := derive(config)) is not None
    }
    if config.with_prior_preservation:
        values["prior_preservation_mode"] = config.prior_mode
    if (
        config.validation_epochs
        and config.validation_steps is None
        and config.num_validation_images
    ):
        values |= {
            "validation_steps": config.validation_epochs * steps_per_epoch,
            "validation_epochs": None,
        }
    return dataclasses.replace(
        config,
        **values,
        resolution=resolution,
        max_train_steps=total_steps,
        num_train_epochs=None,
        lr_scheduler=config.lr_schedule,
        mixed_precision=mixed_precision,
    )


def overridden(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A file's settings without those that followed from what the command line changes.

    The ``config.yaml`` of a run holds its derived settings. With another ``--rank``, its
    ``lora_alpha`` must follow as it did; one that was set apart stays.
    """
    left = dict(values)
    if not given:
        return left
    if "num_train_epochs" in given and "max_train_steps" not in given:
        left.pop("max_train_steps", None)
    if "validation_epochs" in given and "validation_steps" not in given:
        left.pop("validation_steps", None)
    try:
        config = TrainConfig.from_dict(values)
    except ConfigError:
        return left
    for name, derive in DERIVED.items():
        if name in left and getattr(config, name) == derive(config):
            del left[name]
    return left


def as_yaml(config: TrainConfig) -> str:
    """The settings as ``--config`` reads them; what is not set says its default beside it."""
    import yaml

    defaults = {setting.name: setting.default_text for setting in settings()}
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    return re.sub(
        r"^(\w+): null$", lambda match: f"{match[0]}  # {defaults[match[1]]}", text, flags=re.M
    )
