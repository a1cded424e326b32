"""From the page's choices to `TrainConfig`, and from there to the same run's command line."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.app.bases import UNKNOWN, check_base, check_variant, facts_of
from dora_diffusion.config import Setting, TrainConfig, settings, without_effect
from dora_diffusion.families import FAMILIES, USUAL
from dora_diffusion.jobs.queue import is_small
from dora_diffusion.jobs.workspace import AppError, clean_text
from dora_diffusion.memory import Device, fitting_settings
from dora_diffusion.models.locate import EMBEDDED_PREFIX, looks_local
from dora_diffusion.toy import MODELS

PROMPT_LIMIT = 1000
EMBEDDED_MODELS = tuple(f"{EMBEDDED_PREFIX}{name}" for name in MODELS)
EMBEDDED = EMBEDDED_MODELS[0]
PRESET_NAMES = ("fast", "balanced", "quality")

# Fields of their own on the page, and what the app itself decides: where a run lies, when it
# resumes, and (in the Library) whether it is published. use_8bit_adam is an optimizer's other name.
_NOT_ADVANCED = frozenset((
    "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "token", "class_word",
    "validation_prompt", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "logging_dir", "push_to_hub", "hub_model_id", "use_8bit_adam",
))  # fmt: skip
SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in settings()}
ADVANCED: tuple[str, ...] = tuple(name for name in SETTINGS if name not in _NOT_ADVANCED)
# Advanced settings by heading, as --help has them. Each keeps its name on the command line.
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name in ADVANCED if SETTINGS[name].group == group)
    for group in dict.fromkeys(SETTINGS[name].group for name in ADVANCED)
}

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
    "train_batch_size": 5, "validation_guidance_scale": 3.5, "validation_steps": 50,
    "checkpointing_steps": 50,
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
        "max_train_steps": round(share * FAMILIES.get(facts.family, USUAL).default_steps),
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
        prompts: Prompts of the sample images; ``{subject}`` stands for token and class word.
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
    kind = SETTINGS[name].kind
    if SETTINGS[name].is_list:
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


def shown_choices(setting: Setting) -> list[tuple[str, str]]:
    """What a setting may be, as (label, `setting_text`); empty where it may be anything."""
    choices = [(choice, choice) for choice in setting.choices or ()]
    is_optional = bool(choices) and setting.default is None
    return [(setting.default_text, ""), *choices] if is_optional else choices


def command_line(config: TrainConfig) -> str:
    """The command that does the same run: the base model, and what is not the default's.

    Example:
        >>> command_line(TrainConfig(rank=4)).splitlines()[-1].strip()
        '--rank 4'
    """
    default, words = TrainConfig(), []
    for name in SETTINGS:
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
