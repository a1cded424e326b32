"""Values derived from settings: defaults, inactive settings, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.fields import ConfigError, Setting, shown
from dora_diffusion.config.file import PATHS, RELATIVE
from dora_diffusion.config.learning import WEIGHTINGS
from dora_diffusion.config.paths import relative_paths
from dora_diffusion.config.subject import ENTRY_SETTINGS
from dora_diffusion.config.train import TrainConfig, framed_prompt, settings

Changes = dict[str, tuple[Any, Any]]

# Learning rates that are usual, generously: least and most. Adafactor's is not relative to the
# weights here, and its updates are clipped: Adam's rates. Prodigy multiplies its own by it.
_ADAPTER, _VERA, _FULL, _PRODIGY = (1e-6, 5e-3), (1e-5, 1e-1), (1e-8, 1e-4), (0.1, 10.0)
_INNERMOST = re.compile(r"(?<!\\)\{([^{}|]*)(?:\|[^{}]*)?\}")
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


def usual_class_word(config: TrainConfig) -> str:
    """The class word that follows from the instance prompt; of wildcards the first alternative."""
    prompt, before = framed_prompt(config), ""
    while config.wildcards and prompt != before:
        prompt, before = _INNERMOST.sub(r"\1", prompt), prompt
    return class_word_in(prompt, config.token.strip())


def _class_word(config: TrainConfig) -> str | None:
    if config.dataset_config:  # Each entry's follows from its own prompt.
        return None
    return usual_class_word(config) or None


def _validation_prompt(config: TrainConfig) -> list[str]:
    is_sampled = config.num_validation_images and not config.sample_prompts
    return config.taught_prompts if is_sampled else []


def _alpha(config: TrainConfig, rank: int) -> float | None:
    """The rank, where layers have an alpha of their own and none that they start from."""
    return None if config.parametrization == "vera" or config.init_adapter else float(rank)


def _class_data_dir(config: TrainConfig) -> str | None:
    is_used = config.uses_class_images and not config.dataset_config
    return str(Path(config.output_dir) / "class_images") if is_used else None


def _validation_steps(config: TrainConfig) -> int | None:
    return 200 if config.num_validation_images and not config.validation_epochs else None


def _validation_loss_steps(config: TrainConfig) -> int | None:
    is_known = config.validation_steps or not config.validation_epochs
    return config.validation_steps or 200 if config.holds_out and is_known else None


DERIVED: Mapping[str, Callable[[TrainConfig], Any]] = {
    "learning_rate": lambda config: config.usual_lr,
    "lora_alpha": lambda config: _alpha(config, config.rank),
    "conv_alpha": lambda config: _alpha(config, config.conv_rank),
    "class_word": _class_word,
    "new_words": lambda config: config.words,
    "validation_prompt": _validation_prompt,
    "validation_steps": _validation_steps,
    "validation_loss_steps": _validation_loss_steps,
    # A checkpoint of a whole model takes gigabytes.
    "checkpointing_steps": lambda config: 500 if config.is_full else 100,
    "class_data_dir": _class_data_dir,
    "adam_weight_decay_text_encoder": lambda config: (
        config.adam_weight_decay if config.train_text_encoder else None
    ),
}
"""Setting -> its value where none is given, from the others."""
# Those that follow from the model.
_BY_MODEL = ("resolution", "snr_gamma")


def usual_snr_gamma(config: TrainConfig, prediction_type: str) -> float:
    """Gamma of min-SNR where none is given; 0: no weighting.

    Its weight of v goes to 0 with the SNR, where shape is decided:
    docs/measurements/min-snr.md has what that costs. A slider's predictions count alike, as in its
    paper.
    """
    is_usual = prediction_type == "epsilon" and not config.weightings and not config.is_slider
    return 5.0 if is_usual else 0.0


def resolve(
    config: TrainConfig,
    *,
    prediction_type: str,
    resolution: int,
    total_steps: int,
    steps_per_epoch: int,
    mixed_precision: str,
) -> TrainConfig:
    """The settings of a run as they are used: defaults that follow from something, written out.

    Args:
        config: The settings as they were given.
        prediction_type: What the model predicts.
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
    if config.snr_gamma is None:
        values["snr_gamma"] = usual_snr_gamma(config, prediction_type)
    if config.with_prior_preservation and not config.dataset_config:
        values["prior_preservation_mode"] = config.prior_mode
    is_shown = config.num_validation_images or config.holds_out
    if config.validation_epochs and config.validation_steps is None and is_shown:
        steps = config.validation_epochs * steps_per_epoch
        values |= {"validation_steps": steps, "validation_epochs": None}
        if config.holds_out and config.validation_loss_steps is None:
            values["validation_loss_steps"] = steps
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
    if {"pretrained_model_name_or_path", "prediction_type", *WEIGHTINGS} & {*given}:
        left.pop("snr_gamma", None)
    try:
        config = TrainConfig.from_dict(values)
    except ConfigError:
        return left
    for name, derive in DERIVED.items():
        if name in left and getattr(config, name) == derive(config):
            del left[name]
    return left


def as_yaml(config: TrainConfig, folder: Path | None = None) -> str:
    """The settings as ``--config`` reads them; what is not set says its default beside it.

    Args:
        config: The settings.
        folder: Folder of the file that they are for; paths are then relative to it.
    """
    import yaml

    defaults = {setting.name: setting.default_text for setting in settings()}
    values = config.to_dict()
    if folder is not None:
        values = {PATHS: RELATIVE, **relative_paths(values, folder)}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return re.sub(
        r"^(\w+): null$", lambda match: f"{match[0]}  # {defaults[match[1]]}", text, flags=re.M
    )


@check_arguments()
def without_effect(config: TrainConfig, given: Collection[str] | None = None) -> dict[str, str]:
    """Settings that were given, and why they have no effect.

    Args:
        config: The settings of a run.
        given: Names that were given; None means those that differ from their default.

    Example:
        >>> without_effect(TrainConfig(keep_tags=3))
        {'keep_tags': 'keep_tags has no effect because shuffle_tags is off and tag_dropout is 0.0'}
    """
    reasons, subjects = {}, config.subjects
    for setting in settings():
        moved = getattr(config, setting.name) != setting.default
        if not (moved if given is None else setting.name in given):
            continue
        inactive = [setting.inactive_reason(subject) for subject in subjects]
        overridden = [setting.name in entry for entry in config.dataset_config]
        reason = inactive[0] if all(inactive) else None
        if overridden and all(overridden):
            reason = "each entry of dataset_config has its own"
        if reason and setting.name == "resolution" and config.num_validation_images:
            # What a run's own file says is the greatest of its entries.
            if config.resolution == max(entry["resolution"] for entry in config.dataset_config):
                continue
            reason = f"{reason}, but for sample images"
        if reason:
            reasons[setting.name] = f"{setting.name} has no effect because {reason}"
    for place, entry in enumerate(config.dataset_config) if given is None else ():
        for name, text in without_effect(subjects[place], entry).items():
            reasons.setdefault(name, f"dataset_config, entry {place + 1}: {text}")
    return reasons


@check_arguments()
def unusual_rates(config: TrainConfig) -> list[str]:
    """Learning rates far outside of what the optimizer usually takes, each with what is usual.

    Example:
        >>> unusual_rates(TrainConfig(learning_rate=0.1))[0]
        'learning_rate is 0.1; for adapters adamw usually takes 1e-06 to 0.005'
    """
    name, what = config.optimizer_name, "full fine-tuning" if config.is_full else "adapters"
    least, most = _FULL if config.is_full else _ADAPTER
    if config.parametrization == "vera" and not config.is_full:
        (least, most), what = _VERA, "VeRA"
    if config.is_prodigy:
        least, most = _PRODIGY
    rates = {"learning_rate": (config.unet_lr, most)}
    if config.train_text_encoder and not config.is_prodigy:
        rates["text_encoder_lr"] = (config.text_encoder_lr, most)
    if not config.is_full:
        # Each stands for a part of the adapter that takes larger steps.
        rates |= {f"lr_pattern {name}": (rate, most) for name, rate in config.lr_pattern.items()}
        rates["magnitude_lr"] = (config.magnitude_lr or 0, 10 * most)
        rates["learning_rate times loraplus_ratio"] = (
            config.unet_lr * config.loraplus_ratio * (config.loraplus_ratio != 1), 10 * most,
        )  # fmt: skip
    return [
        f"{setting} is {rate:g}; for {what} {name} usually takes {least:g} to {limit:g}"
        for setting, (rate, limit) in rates.items()
        if rate and not least <= rate <= limit
    ]


@check_arguments()
def differences(before: Mapping[str, Any], now: TrainConfig) -> tuple[Changes, Changes]:
    """Compare a run's settings with those of the checkpoint that it resumes.

    A setting that has no effect is not compared, nor one that the checkpoint does not know.

    Args:
        before: The settings that the checkpoint holds.
        now: The settings of this run.

    Returns:
        Name -> (before, now): of settings that must be the same, and of those that may change.
    """
    refused, allowed = _differences(before, now)
    old, new = before.get("dataset_config") or [], now.dataset_config
    if len(old) != len(new):
        refused["dataset_config"] = (f"{len(old)} entries", f"{len(new)} entries")
        return refused, allowed
    for place, (entry, subject) in enumerate(zip(old, now.subjects, strict=False), start=1):
        changes, _ = _differences({**before, **entry}, subject)
        refused |= {
            f"{name} of entry {place}": change
            for name, change in changes.items()
            if name in ENTRY_SETTINGS and refused.get(name) != change
        }
    return refused, allowed


def _differences(before: Mapping[str, Any], now: TrainConfig) -> tuple[Changes, Changes]:
    """The differences of settings that have one value for the whole run."""
    refused: Changes = {}
    allowed: Changes = {}
    for setting in settings():
        old, new = before.get(setting.name, setting.default), getattr(now, setting.name)
        if setting.resume == "ignored" or setting.inactive_reason(now) or _same(setting, old, new):
            continue
        # A schedule-free average is defined by beta1.
        is_free = setting.resume == "free" and not (
            setting.name == "adam_beta1" and now.is_schedule_free
        )
        if is_free:
            allowed[setting.name] = (old, new)
        # Otherwise the checkpoint says what was given, not what followed from it.
        elif old is not None or setting.name not in (*DERIVED, *_BY_MODEL):
            refused[setting.name] = (old, new)
    return refused, allowed


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """``"rank (8 -> 16), seed (0 -> 1)"``."""
    return ", ".join(f"{name} ({shown(a)} -> {shown(b)})" for name, (a, b) in changes.items())


def _same(setting: Setting, old: Any, new: Any) -> bool:
    if old == new or not (setting.is_path and old and new):
        return bool(old == new)
    # By what the file system says: names may differ in case, or be of a link.
    places = [os.path.expanduser(str(value)) for value in (old, new)]
    return all(map(os.path.exists, places)) and os.path.samefile(*places)
