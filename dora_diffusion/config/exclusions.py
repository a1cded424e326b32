"""Settings that exclude a way of running, a pack or sharding; features add their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dora_diffusion.config.features.feature import Excluded, Problem


def _chunks(config: Any) -> bool:
    # In a text encoder, a caption in chunks occupies several rows, and a dropped one none.
    return bool(config.train_text_encoder and config.max_token_length != 75)


def _skips(config: Any) -> bool:
    drops = any(subject.caption_dropout for subject in config.subjects)
    return bool(config.train_text_encoder and config.clip_skip > 0 and drops)


def _adapts_table(config: Any) -> bool:
    return config.train_text_encoder and "token-embedding" in config.text_encoder_targets


_EXCLUDED = (
    Excluded("pack", setting="parametrization", when=lambda c: c.parametrization == "vera"),
    Excluded("pack", setting="init", when=lambda c: c.init == "pissa"),
    Excluded("pack", setting="lora_dropout", when=lambda c: c.lora_dropout > 0),
    Excluded("pack", setting="text_encoder_targets", when=_adapts_table),
    Excluded("pack", setting="max_token_length", when=_chunks),
    Excluded("pack", setting="clip_skip", when=_skips),
    Excluded("pack", setting="report_to", when=lambda c: c.report_to is not None),
    Excluded("pack", setting="push_to_hub", when=lambda c: c.push_to_hub),
    Excluded(
        "sharding",
        "excludes quantize: quantised weights cannot be sharded",
        when=lambda c: c.quantize != "none",
    ),
    Excluded(
        "sharding",
        "excludes offload model: each process keeps its shard on its device",
        when=lambda c: c.offload == "model",
    ),
)  # fmt: skip


def exclusions(config: Any, way: str) -> Iterator[Problem]:
    """Yield the settings that exclude a way of running, each with the reason, if there is one."""
    own = ((one.on.setting, row) for one in config.features for row in one.excludes)
    for setting, row in (*(("", row) for row in _EXCLUDED), *own):
        if row.way == way and row.when(config):
            yield row.setting or setting, row.reason
