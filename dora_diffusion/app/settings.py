"""From the page's choices to `TrainConfig`, and from there to the same run's command line."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.app.bases import UNKNOWN, check_base, check_variant, facts_of
from dora_diffusion.app.jobs import is_small
from dora_diffusion.app.workspace import AppError, clean_text
from dora_diffusion.config import TrainConfig, setting_type, without_effect
from dora_diffusion.embedded import MODELS
from dora_diffusion.memory import Device, fitting_settings
from dora_diffusion.models.family import FAMILIES
from dora_diffusion.models.locate import EMBEDDED_PREFIX, looks_local

PROMPT_LIMIT = 1000
EMBEDDED_MODELS = tuple(f"{EMBEDDED_PREFIX}{name}" for name in MODELS)
EMBEDDED = EMBEDDED_MODELS[0]
PRESET_NAMES = ("fast", "balanced", "quality")

# Advanced settings by heading. Each keeps its name on the command line.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Length and samples": (
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "seed",
        "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
        "num_validation_images", "validation_inference_steps", "validation_guidance_scale",
    ),
    "Adapter": (
        "use_dora", "norm_axis", "rank", "lora_alpha", "conv_rank", "conv_alpha", "rslora",
        "lora_dropout", "targets", "train_text_encoder", "text_encoder_targets",
    ),
    "Optimisation": (
        "learning_rate", "text_encoder_lr", "magnitude_lr", "loraplus_ratio", "lr_scheduler",
        "lr_warmup_steps", "optimizer", "adam_weight_decay", "max_grad_norm", "snr_gamma",
        "noise_offset", "mixed_precision", "gradient_checkpointing", "allow_tf32",
    ),
    "Base model": (
        "pretrained_vae_model_name_or_path", "model_config", "variant", "revision",
    ),
    "Photos and captions": (
        "resolution", "center_crop", "random_flip", "aspect_ratio_buckets", "masked_loss",
        "shuffle_tags", "keep_tags", "caption_dropout",
    ),
    "Keeping the class (prior preservation)": (
        "with_prior_preservation", "prior_preservation_mode", "class_prompt", "class_data_dir",
        "num_class_images", "prior_loss_weight", "sample_batch_size",
    ),
}  # fmt: skip
ADVANCED: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
FIELDS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}

# A crop that is drawn cannot be shown beforehand: the app trains on the middle unless told not to.
_COMMON: Mapping[str, Any] = {"center_crop": True, "num_validation_images": 3}
# The embedded model is small: it takes larger steps (as in samples/*/config.yaml).
_EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "fast": {"max_train_steps": 120},
    "balanced": {"max_train_steps": 300},
    "quality": {"max_train_steps": 600},
}
_EMBEDDED_COMMON: Mapping[str, Any] = {
    "learning_rate": 2e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 10, "conv_rank": 8,
    "train_batch_size": 5, "num_class_images": 40, "validation_guidance_scale": 3.5,
    "validation_steps": 50, "checkpointing_steps": 50,
}  # fmt: skip
# Steps as a share of the command line's default for the family.
_RELEASED: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    "fast": (0.5, {"with_prior_preservation": False}),
    "balanced": (1, {"with_prior_preservation": True, "prior_preservation_mode": "image-free"}),
    "quality": (1.5, {"with_prior_preservation": True, "rank": 16}),
}
_RELEASED_COMMON: Mapping[str, Any] = {"validation_steps": 200, "checkpointing_steps": 100}


def preset_values(preset: str, model: str, device: Device | None = None) -> dict[str, Any]:
    """Every advanced setting of a preset for a model on a device.

    Args:
        preset: One of `PRESET_NAMES`.
        model: Base model; one that is not there gets what suits Stable Diffusion 1.
        device: What it would train on, for precision, gradient checkpointing and optimizer.

    Raises:
        AppError: If there is no such preset.
    """
    if preset not in PRESET_NAMES:
        raise AppError(f"there is no preset {preset!r}; choose {', '.join(PRESET_NAMES)}")
    values = TrainConfig().to_dict() | dict(_COMMON)
    if is_small(model):
        values |= {**_EMBEDDED_COMMON, **_EMBEDDED[preset]}
    else:
        values |= _released_values(preset, model, device or Device())
    return {name: values[name] for name in ADVANCED}


def _released_values(preset: str, model: str, device: Device) -> dict[str, Any]:
    try:
        facts = facts_of(model)
    except AppError:
        facts = UNKNOWN
    share, table = _RELEASED[preset]
    values = {
        **_RELEASED_COMMON,
        **table,
        "max_train_steps": round(share * FAMILIES[facts.family or "sd1"].default_steps),
    }
    family = facts.family if facts.has_released_shape else ""
    batch = 2 if table["with_prior_preservation"] else 1
    return values | fitting_settings(family, facts.resolution, device, batch=batch)


def idle_settings(config: TrainConfig) -> list[str]:
    """Settings that were changed by hand and have no effect, each with the reason."""
    presets = [
        preset_values(preset, config.pretrained_model_name_or_path) for preset in PRESET_NAMES
    ]
    changed = [
        name
        for name in ADVANCED
        if all(getattr(config, name) != values[name] for values in presets)
    ]
    return list(without_effect(config, changed).values())


def make_config(
    model: str,
    photos: Path,
    output_dir: Path,
    token: str,
    class_word: str,
    prompts: Sequence[str],
    advanced: Mapping[str, Any],
) -> TrainConfig:
    """The settings of a run.

    Args:
        model: Base model: ``embedded:NAME``, hub id, folder or file.
        photos: Folder of photos.
        output_dir: The job's folder.
        token: The word that will mean the subject.
        class_word: What the subject is.
        prompts: Prompts of the sample pictures; ``{subject}`` stands for token and class word.
        advanced: Values by setting name, as the page's fields give them.

    Raises:
        AppError, ConfigError: If a value cannot work, in one line.
    """
    token = clean_text(token, 50, "token")
    class_word = clean_text(class_word, 100, "class")
    if not token or " " in token:
        raise AppError("the token must be one rare word, such as sks")
    if not class_word:
        raise AppError("say what the subject is: one or two words such as mug, dog or toy robot")
    subject = f"{token} {class_word}"
    lines = [clean_text(line, PROMPT_LIMIT, "sample prompt") for line in prompts]
    values = {name: _value(name, advanced[name]) for name in ADVANCED if name in advanced}
    return TrainConfig.from_dict(
        {
            **values,
            "pretrained_model_name_or_path": clean_text(model, 500, "model name") or EMBEDDED,
            "instance_data_dir": str(photos),
            "instance_prompt": f"a photo of a {subject}",
            "token": token,
            "class_word": class_word,
            "validation_prompt": [line.replace("{subject}", subject) for line in lines if line],
            "output_dir": str(output_dir),
        }
    )


def check_model(config: TrainConfig, *, ask_hub: bool = False) -> None:
    """Say before a run that a model, or a folder that it names, is not there.

    Args:
        config: The settings.
        ask_hub: Ask the hub for models that are not on this machine.

    Raises:
        AppError: What is missing, and what to do.
    """
    check_base(config.pretrained_model_name_or_path, config.revision, ask_hub=ask_hub)
    vae, folder = config.pretrained_vae_model_name_or_path, config.model_config
    if vae and looks_local(vae) and not Path(vae).expanduser().exists():
        raise AppError(f"the VAE {vae} does not exist; give a folder, a file or a hub id")
    if folder and looks_local(folder) and not Path(folder, "model_index.json").is_file():
        raise AppError(f"model_config {folder} is no Diffusers folder: it has no model_index.json")
    classes = config.class_data_dir
    if classes and Path(classes).exists() and not Path(classes).is_dir():
        raise AppError(f"class_data_dir {classes} is a file; give a folder of class images")
    check_variant(config.pretrained_model_name_or_path, config.variant)


def _value(name: str, value: Any) -> Any:
    """A field's value in the setting's type; an empty field means the default."""
    kind, is_list = setting_type(FIELDS[name])
    if is_list:
        items = value.split() if isinstance(value, str) else list(value or [])
        return items or list(getattr(TrainConfig(), name))
    if value is None or (kind is not bool and not str(value).strip()):
        return getattr(TrainConfig(), name)
    if kind is bool:
        return value
    text = clean_text(str(value), PROMPT_LIMIT, name)
    return text if kind is str else _number(name, kind, text)


def _number(name: str, kind: type, text: str) -> int | float:
    """A number as it was typed."""
    try:
        number = float(text)
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number.is_integer():
            return int(number)
    except (ValueError, OverflowError):
        pass
    wanted = "a whole number, such as 8" if kind is int else "a number, such as 0.5 or 1e-4"
    raise AppError(f"{name} is {text!r}; it must be {wanted}, or empty for the default")


def setting_text(value: Any) -> Any:
    """A setting's value as its field shows it: text, but for a box that is ticked.

    Numbers are text too: an empty number field of Gradio's turns into 0 when it is unfolded.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return " ".join(value)
    return "" if value is None else str(value)


def command_line(config: TrainConfig) -> str:
    """The command that does the same run: the base model, and what is not the default's.

    Example:
        >>> command_line(TrainConfig(rank=4)).splitlines()[-1].strip()
        '--rank 4'
    """
    default, words = TrainConfig(), []
    for name in FIELDS:
        value = getattr(config, name)
        if value == getattr(default, name) and name != "pretrained_model_name_or_path":
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words.append(f"--{name} {' '.join(shlex.quote(str(item)) for item in value)}")
        else:
            words.append(f"--{name} {shlex.quote(str(value))}")
    # With the threads that a job has: another number may round the last bits otherwise.
    threads = "OMP_NUM_THREADS=1 " if is_small(config.pretrained_model_name_or_path) else ""
    return " \\\n    ".join([f"{threads}python -m dora_diffusion train", *words])


def as_yaml(config: TrainConfig) -> str:
    """The settings as ``--config`` reads them."""
    import yaml

    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    return text
