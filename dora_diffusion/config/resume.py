"""What a resumed run may change, from the metadata of the fields."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dora_diffusion.config.derived import DERIVED
from dora_diffusion.config.fields import Setting, shown
from dora_diffusion.config.train import TrainConfig, settings

Changes = dict[str, tuple[Any, Any]]


def differences(before: Mapping[str, Any], now: TrainConfig) -> tuple[Changes, Changes]:
    """How a run's settings differ from those of the checkpoint that it resumes.

    A setting that has no effect is not compared, nor one that the checkpoint does not know.

    Args:
        before: The settings that the checkpoint holds.
        now: The settings of this run.

    Returns:
        Name -> (before, now): of settings that must be the same, and of those that may change.
    """
    refused: Changes = {}
    allowed: Changes = {}
    for setting in settings():
        old, new = before.get(setting.name, setting.default), getattr(now, setting.name)
        if setting.resume == "apart" or setting.idle_reason(now) or _same(setting, old, new):
            continue
        if setting.resume == "free":
            allowed[setting.name] = (old, new)
        # Otherwise the checkpoint says what was given, not what followed from it.
        elif old is not None or setting.name not in (*DERIVED, "resolution"):
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
