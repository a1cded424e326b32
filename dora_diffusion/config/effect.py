"""Settings that were given and have no effect: one check, from the metadata of the fields."""

from __future__ import annotations

from collections.abc import Collection

from dora_diffusion.config.train import TrainConfig, settings


def without_effect(config: TrainConfig, given: Collection[str] | None = None) -> dict[str, str]:
    """Settings that were given, and why they have no effect.

    Args:
        config: The settings of a run.
        given: Names that were given; None means those that differ from their default.

    Example:
        >>> without_effect(TrainConfig(keep_tags=3))
        {'keep_tags': 'keep_tags has no effect because shuffle_tags is off'}
    """
    reasons = {}
    for setting in settings():
        moved = getattr(config, setting.name) != setting.default
        if not (moved if given is None else setting.name in given):
            continue
        reason = setting.idle_reason(config)
        if reason:
            reasons[setting.name] = f"{setting.name} has no effect because {reason}"
    return reasons
