"""Exclusions: settings that contradict each other, a way of running or a model of a family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dora_diffusion.config.base import QUANTISATIONS
from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.config.features.feature import Excluded, Problem
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.problems import Problems


def adapts_table(config: Any) -> bool:
    """Return whether adapters are on the token table of a text encoder."""
    adapts_text = config.train_text_encoder and config.trains_adapters
    return adapts_text and "token-embedding" in config.text_encoder_targets


def _chunks(config: Any) -> bool:
    # In a text encoder, a caption in chunks occupies several rows, and a dropped one none.
    return bool(config.train_text_encoder and config.max_token_length != 75)


def _skips(config: Any) -> bool:
    drops = any(subject.caption_dropout for subject in config.subjects)
    return bool(config.train_text_encoder and config.clip_skip > 0 and drops)


def _has_rates(config: Any) -> bool:
    has_own = config.magnitude_lr is not None or config.loraplus_ratio != 1 or config.lr_pattern
    return bool(config.is_prodigy and has_own)


_EXCLUDED = (
    Excluded("run", "push_to_hub needs --hub_model_id NAME/MODEL", "push_to_hub",
             when=lambda config: config.push_to_hub and "/" not in (config.hub_model_id or "")),
    Excluded("run", "learning_rate is {config.unet_lr}, but Prodigy estimates the rate and "
             "multiplies it by learning_rate; use 1", "learning_rate",
             when=lambda config: config.is_prodigy and config.unet_lr < 0.1),
    Excluded("run", "Prodigy has one rate for all parameters; leave out magnitude_lr, "
             "loraplus_ratio and lr_pattern", "optimizer", when=_has_rates),
    Excluded("pack", "", "parametrization", ("vera",)),
    Excluded("pack", "", "init", ("pissa",)),
    Excluded("pack", "", "lora_dropout"),
    Excluded("pack", "", "text_encoder_targets", when=adapts_table),
    Excluded("pack", "", "max_token_length", when=_chunks),
    Excluded("pack", "", "clip_skip", when=_skips),
    Excluded("pack", "", "report_to"),
    Excluded("pack", "", "push_to_hub"),
    Excluded("sharding", "excludes quantize: quantised weights cannot be sharded", "quantize",
             QUANTISATIONS),
    Excluded("sharding", "excludes offload model: each process keeps its shard on its device",
             "offload", ("model",)),
)  # fmt: skip


def _of_family(family: Family) -> Iterator[Excluded]:
    for key, reason in family.refused.items():
        name, *values = key.split("=")
        text = f"{key} cannot be used with {{model}} ({family.title}): {reason}; leave it out"
        yield Excluded(family.name, text, name, tuple(values))


def exclusions(config: Any, way: str, **values: str) -> Iterator[Problem]:
    """Yield the settings that exclude something, each with the reason, if there is one.

    Args:
        config: Settings of a run, an image or a base model.
        way: What they may exclude: see `Excluded`.
        values: Other values for the reasons than ``config``.
    """
    rows = [("", row) for row in _EXCLUDED]
    rows += [("", row) for row in (_of_family(FAMILIES[way]) if way in FAMILIES else ())]
    rows += [(f.on.setting, row) for f in getattr(config, "features", ()) for row in f.excludes]
    for setting, row in rows:
        if row.way == way and row.applies(config):
            yield row.setting or setting, row.reason.format(config=config, **values)


def refuse(config: Any, family: Family, model: str) -> None:
    """Refuse settings that would give wrong results with a model of a family.

    Raises:
        ConfigError: If some do, with all of them.
    """
    problems = Problems()
    for setting, message in exclusions(config, family.name, model=model):
        problems.add(ConfigError(message, setting))
    problems.raise_all()
