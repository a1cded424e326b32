"""From the page's choices to `TrainConfig`, and from there to the same run's command line."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.app.jobs import is_small
from dora_diffusion.app.workspace import AppError, clean_text
from dora_diffusion.config import TrainConfig, setting_type
from dora_diffusion.embedded import MODELS
from dora_diffusion.models.locate import EMBEDDED_PREFIX

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
    "Photos and captions": (
        "resolution", "center_crop", "random_flip", "aspect_ratio_buckets", "masked_loss",
        "shuffle_tags", "keep_tags", "caption_dropout",
    ),
    "Keeping the class (prior preservation)": (
        "with_prior_preservation", "prior_preservation_mode", "class_prompt", "num_class_images",
        "prior_loss_weight", "sample_batch_size",
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
_RELEASED: Mapping[str, Mapping[str, Any]] = {
    "fast": {"max_train_steps": 400, "with_prior_preservation": False},
    "balanced": {
        "max_train_steps": 800,
        "with_prior_preservation": True,
        "prior_preservation_mode": "image-free",
    },
    "quality": {"max_train_steps": 1200, "with_prior_preservation": True, "rank": 16},
}
_RELEASED_COMMON: Mapping[str, Any] = {"validation_steps": 200, "checkpointing_steps": 100}


def preset_values(preset: str, model: str) -> dict[str, Any]:
    """Every advanced setting of a preset for a model.

    Raises:
        AppError: If there is no such preset.
    """
    if preset not in PRESET_NAMES:
        raise AppError(f"there is no preset {preset!r}; choose {', '.join(PRESET_NAMES)}")
    small = is_small(model)
    table, common = (_EMBEDDED, _EMBEDDED_COMMON) if small else (_RELEASED, _RELEASED_COMMON)
    values = {**TrainConfig().to_dict(), **_COMMON, **common, **table[preset]}
    return {name: values[name] for name in ADVANCED}


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


def _value(name: str, value: Any) -> Any:
    """A field's value in the setting's type; an empty field means the default."""
    kind, is_list = setting_type(FIELDS[name])
    if is_list:
        items = value.split() if isinstance(value, str) else list(value or [])
        return items or list(getattr(TrainConfig(), name))
    if value is None or (kind is str and not str(value).strip()):
        return getattr(TrainConfig(), name)
    return clean_text(value, PROMPT_LIMIT, name) if kind is str else value


def command_line(config: TrainConfig) -> str:
    """The command that does the same run: every setting that is not the default's.

    Example:
        >>> command_line(TrainConfig(rank=4)).splitlines()[-1].strip()
        '--rank 4'
    """
    default, words = TrainConfig(), []
    for name in FIELDS:
        value = getattr(config, name)
        if value == getattr(default, name):
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
