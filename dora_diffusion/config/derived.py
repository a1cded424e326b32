"""Values derived from settings: defaults, inactive settings, changes allowed on resume."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import ChainMap
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import DEFAULT_FAMILY, PREDICTION_TYPES, Family
from dora_diffusion.config.features.average import SCHEDULE_FREE
from dora_diffusion.config.features.prior import prior_mode
from dora_diffusion.config.fields import ConfigError, Setting, shown
from dora_diffusion.config.file import PATHS, RELATIVE
from dora_diffusion.config.flag_map import had_no_effect
from dora_diffusion.config.train import (
    TrainConfig,
    features_of,
    prefixed_prompt,
    settings,
    settings_by_name,
    taught_prompts,
)

Changes = dict[str, tuple[Any, Any]]

# Least and most of the usual learning rates, generously, of VeRA, and of Prodigy, which multiplies
# its estimate by the rate. Adafactor takes Adam's rates: its rate is not relative to the weights
# here, and its updates are clipped.
_VERA, _PRODIGY = (1e-5, 1e-1), (0.1, 10.0)
# Words after which a prompt describes the scene or the style: a class word ends before them.
_NEXT_PHRASE = re.compile(
    r"[,.;:()]|\b(?:on|in|at|with|by|under|over|near|against|wearing|from|and|of|beside)\b.*", re.I
)


def class_word_in(prompt: str, token: str) -> str:
    """Words after the token: ``"a photo of a sks robot toy on grass"`` -> ``"robot toy"``."""
    if not token:
        return ""
    _, _, rest = prompt.lower().partition(token.lower())
    return _NEXT_PHRASE.split(rest, maxsplit=1)[0].strip()


def usual_class_word(config: TrainConfig) -> str:
    """Class word of the instance prompt."""
    return class_word_in(prefixed_prompt(config), config.token.strip())


def _class_word(config: TrainConfig) -> str | None:
    if config.dataset_config:  # Each entry derives it from its own prompt.
        return None
    return usual_class_word(config) or None


def _validation_prompt(config: TrainConfig) -> list[str]:
    is_sampled = config.num_validation_images and not config.sample_prompts
    return taught_prompts(config) if is_sampled else []


def _alpha(config: TrainConfig, rank: int) -> float | None:
    """Default alpha: the rank. None for VeRA and for layers that keep the alpha of init_adapter."""
    return None if config.parametrization == "vera" or config.init_adapter else float(rank)


def defaults_of(config: TrainConfig, family: Family = DEFAULT_FAMILY) -> dict[str, Any]:
    """Return the defaults that follow from other settings, and from the features that are on."""
    defaults: dict[str, Any] = {
        "learning_rate": family.default_rate,
        "lora_alpha": _alpha(config, config.rank),
        "conv_alpha": _alpha(config, config.conv_rank),
        "class_word": _class_word(config),
        "validation_prompt": _validation_prompt(config),
        "validation_steps": (
            200 if config.num_validation_images and not config.validation_epochs else None
        ),
        "checkpointing_steps": 100,
        "adam_weight_decay_text_encoder": (
            config.adam_weight_decay if config.train_text_encoder else None
        ),
    }
    return dict(ChainMap(*(dict(one.defaults(config)) for one in config.features), defaults))


_MODEL = "pretrained_model_name_or_path"
# Settings whose default depends on it.
_BY_MODEL = ("resolution", "snr_gamma")


def usual_snr_gamma(config: TrainConfig, prediction_type: str) -> float:
    """Default gamma of min-SNR; 0: no weighting.

    For v-prediction, its weight goes to 0 with the SNR, at the timesteps that decide the shape of
    the image: lab/measurements/min-snr.md measures the cost.
    """
    gamma: float = config.default("snr_gamma", 5.0 if prediction_type == "epsilon" else 0.0)
    return gamma


def resolve(
    config: TrainConfig,
    *,
    family: Family,
    prediction_type: str,
    resolution: int,
    total_steps: int,
    steps_per_epoch: int,
    mixed_precision: str,
) -> TrainConfig:
    """Replace all derived defaults of a run by their values.

    Args:
        config: Settings with unresolved defaults.
        family: Family of the model.
        prediction_type: Prediction type of the model.
        resolution: Training resolution in pixels.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps per epoch, rounded up.
        mixed_precision: Precision that ``auto`` selects on this machine.
    """
    if config.validation_epochs and config.uses("validation_epochs"):
        steps = config.validation_epochs * steps_per_epoch
        config = dataclasses.replace(config, validation_steps=steps, validation_epochs=None)
    values = {
        name: value
        for name, value in defaults_of(config, family).items()
        if getattr(config, name) in (None, []) and value is not None
    }
    if config.snr_gamma is None:
        values["snr_gamma"] = usual_snr_gamma(config, prediction_type)
    if config.with_prior_preservation and not config.dataset_config:
        values["prior_preservation_mode"] = prior_mode(config)
    return dataclasses.replace(
        config,
        **values,
        resolution=resolution,
        max_train_steps=total_steps,
        num_train_epochs=None,
        lr_scheduler=config.lr_schedule,
        mixed_precision=mixed_precision,
    )


def overridden(
    values: Mapping[str, Any],
    changed: Collection[str],
    family: Family = DEFAULT_FAMILY,
    resolution: int = 0,
) -> dict[str, Any]:
    """Drop derived settings of a file whose source the command line changes.

    The ``config.yaml`` of a run holds derived settings, too. With another ``--rank``, a derived
    ``lora_alpha`` must follow it; an explicitly set one is kept.

    Args:
        values: Settings of the file.
        changed: Names of the settings that the command line changes.
        family: Family of the file's base model.
        resolution: Training resolution of that model.
    """
    kept_values = dict(values)
    if not changed:
        return kept_values
    if "num_train_epochs" in changed and "max_train_steps" not in changed:
        kept_values.pop("max_train_steps", None)
    if "validation_epochs" in changed and "validation_steps" not in changed:
        kept_values.pop("validation_steps", None)
    try:
        config = TrainConfig.from_dict(values)
    except ConfigError:
        return kept_values
    derived, features = defaults_of(config, family), features_of(type(config))
    if _MODEL in changed:
        derived["resolution"] = resolution
    if {_MODEL, "sample_model"} & set(changed):
        derived = {**family.defaults, **derived}
    sources = {_MODEL, "prediction_type"}
    sources |= {one.on.setting for one in features if "snr_gamma" in one.adds}
    usual = [usual_snr_gamma(config, kind) for kind in PREDICTION_TYPES]
    if sources.intersection(changed) and config.snr_gamma in usual:
        derived["snr_gamma"] = config.snr_gamma
    for name, value in derived.items():
        if name in kept_values and getattr(config, name) == value:
            del kept_values[name]
    return kept_values


def as_yaml(config: TrainConfig, folder: Path | None = None) -> str:
    """Settings as YAML for ``--config``; comments describe the defaults of unset ones.

    Args:
        config: The settings.
        folder: Folder of the YAML file; paths are written relative to it. None: as they are.
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


def without_effect(
    config: TrainConfig, given: Collection[str] | None = None, family: Family | None = None
) -> dict[str, str]:
    """Find settings without effect, each with the reason.

    Args:
        config: The settings of a run.
        given: Names of the settings to check; None: all that differ from their default, which may
            be the family's.
        family: Family of the base model, whose reasons count too; None: unknown.

    Example:
        >>> without_effect(TrainConfig(lr_power=2.0))
        {'lr_power': 'lr_power has no effect because lr_scheduler is constant'}
    """
    defaults = family.defaults if family and given is None else {}
    names = changed_settings(config) if given is None else given
    names = {n for n in names if n not in defaults or getattr(config, n) != defaults[n]}
    reasons, subjects = family.inactive(names) if family else {}, config.subjects
    for setting in settings():
        if setting.name not in names or setting.name in reasons:
            continue
        inactive = [setting.inactive_reason(subject) for subject in subjects]
        overridden = [setting.name in entry for entry in config.dataset_config]
        reason = inactive[0] if all(inactive) else None
        if overridden and all(overridden):
            reason = "each entry of dataset_config has its own"
        if reason and setting.name == "resolution" and config.num_validation_images:
            # The config.yaml of a run holds the greatest resolution of its entries.
            if config.resolution == max(entry["resolution"] for entry in config.dataset_config):
                continue
            reason = f"{reason}, but for sample images"
        if reason:
            reasons[setting.name] = f"{setting.name} has no effect because {reason}"
    for index, entry in enumerate(config.dataset_config) if given is None else ():
        for name, text in without_effect(subjects[index], entry).items():
            reasons.setdefault(name, f"dataset_config, entry {index + 1}: {text}")
    return reasons


def changed_settings(config: TrainConfig) -> set[str]:
    """Return the names of settings that differ from their defaults."""
    return {s.name for s in settings() if getattr(config, s.name) != s.default}


def unusual_rates(config: TrainConfig) -> list[str]:
    """Describe learning rates far outside of the optimizer's usual range.

    Example:
        >>> unusual_rates(TrainConfig(learning_rate=0.1))[0]
        'learning_rate is 0.1; for adapters adamw usually takes 1e-06 to 0.005'
    """
    run, name = config.describe(), config.optimizer
    (least, most), method = run.rates, run.trained
    if config.parametrization == "vera" and config.trains_adapters:
        (least, most), method = _VERA, "VeRA"
    if config.is_prodigy:
        least, most = _PRODIGY
    rates = {"learning_rate": (config.unet_lr, most)}
    if config.train_text_encoder and not config.is_prodigy:
        rates["text_encoder_lr"] = (config.text_encoder_lr, most)
    if config.trains_adapters:
        # Rates of parts of the adapter; magnitudes and B tolerate larger steps.
        rates |= {f"lr_pattern {name}": (rate, most) for name, rate in config.lr_pattern.items()}
        rates["magnitude_lr"] = (config.magnitude_lr or 0, 10 * most)
        rates["learning_rate times loraplus_ratio"] = (
            config.unet_lr * config.loraplus_ratio * (config.loraplus_ratio != 1), 10 * most,
        )  # fmt: skip
    return [
        f"{setting} is {rate:g}; for {method} {name} usually takes {least:g} to {limit:g}"
        for setting, (rate, limit) in rates.items()
        if rate and not least <= rate <= limit
    ]


def differences(before: Mapping[str, Any], now: TrainConfig) -> tuple[Changes, Changes]:
    """Compare the settings of a run and of the checkpoint that it resumes from.

    Settings without effect are skipped, as are settings that the checkpoint does not have.

    Args:
        before: Settings of the checkpoint.
        now: Settings of this run.

    Returns:
        Changes that prevent resuming, and allowed changes, both as name -> (before, now).
    """
    refused, allowed = _differences(before, now)
    old, new = before.get("dataset_config") or [], now.dataset_config
    if len(old) != len(new):
        refused["dataset_config"] = (f"{len(old)} entries", f"{len(new)} entries")
        return refused, allowed
    for number, (entry, subject) in enumerate(zip(old, now.subjects, strict=False), start=1):
        changes, _ = _differences({**before, **entry}, subject)
        refused |= {
            f"{name} of entry {number}": change
            for name, change in changes.items()
            if settings_by_name()[name].of_subject and refused.get(name) != change
        }
    return refused, allowed


def _differences(before: Mapping[str, Any], now: TrainConfig) -> tuple[Changes, Changes]:
    """Compare the settings that have one value for the whole run."""
    refused: Changes = {}
    allowed: Changes = {}
    for setting in settings():
        old, new = before.get(setting.name, setting.default), getattr(now, setting.name)
        if setting.resume == "ignored" or setting.inactive_reason(now) or _same(setting, old, new):
            continue
        # beta1 defines the average of schedule-free optimizers.
        is_free = setting.resume == "free" and not (
            setting.name == "adam_beta1" and now.optimizer in SCHEDULE_FREE
        )
        if is_free:
            allowed[setting.name] = (old, new)
        # A checkpoint holds no derived values: None there may be the same value.
        elif old is not None or setting.name not in (*defaults_of(now), *_BY_MODEL):
            refused[setting.name] = (old, new)
    return refused, allowed


def removed_settings(before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint that this version does not have, unless they had no effect.

    A setting that exists is among them if the checkpoint's value is not valid anymore.

    Args:
        before: Settings of the checkpoint.
    """
    known, removed = settings_by_name(), {}
    entries = before.get("dataset_config") or []
    for name, value in chain(*(values.items() for values in (before, *entries))):
        if name not in known and not had_no_effect(name, value):
            removed[name] = value
        elif name in known and known[name].resume == "same":
            try:
                known[name].check(value)
            except ConfigError:
                removed[name] = value
    return removed


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """``"rank (8 -> 16), seed (0 -> 1)"``."""
    return ", ".join(f"{name} ({shown(a)} -> {shown(b)})" for name, (a, b) in changes.items())


def _same(setting: Setting, old: Any, new: Any) -> bool:
    if old == new or not (setting.is_path and old and new):
        return bool(old == new)
    # Compare files, not names: names may differ in case, or be links.
    paths = [os.path.expanduser(str(value)) for value in (old, new)]
    return all(map(os.path.exists, paths)) and os.path.samefile(*paths)


def relative_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Rewrite the paths of settings for a file in a folder; the inverse of `resolve_paths`.

    Paths inside the folder or its parent become relative to the folder and begin with ``./`` or
    ``../``. Other paths become absolute. Hub ids are kept.
    """
    names = {setting.name for setting in settings() if setting.is_path}
    start = Path(os.path.abspath(folder))

    def rewrite(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [rewrite(name, item) for item in value]
        if isinstance(value, dict):
            return {n: rewrite(n, v) for n, v in value.items()}
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or name not in names or not (path.exists() or name.endswith("_dir")):
            return value
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(start.parent):
            return str(path)
        text = Path(os.path.relpath(path, start)).as_posix()
        return {".": "./", "..": "../"}.get(text, text if text.startswith("../") else f"./{text}")

    rewritten = {name: rewrite(name, value) for name, value in values.items() if name in names}
    return {**values, **rewritten}
