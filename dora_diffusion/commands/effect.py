"""Flags of the commands beside ``train``: numbers that cannot work, and flags without effect."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

from dora_diffusion.config import ConfigError

# What acts on an adapter only, and its default.
_OF_AN_ADAPTER = {
    "strength": 1.0,
    "direction_strength": 1.0,
    "magnitude_strength": 1.0,
    "alpha": None,
}


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse guidance and strengths that are no finite numbers, before a model is loaded.

    Raises:
        ConfigError: If one is not, or the guidance scale is negative.
    """
    guidance = args.guidance_scale
    if guidance is not None and not 0 <= guidance < math.inf:
        raise ConfigError(f"guidance_scale is {guidance}; it must be 0 or more")
    for name in ("strength", "direction_strength", "magnitude_strength"):
        if not math.isfinite(getattr(args, name)):
            raise ConfigError(f"{name} is {getattr(args, name)}; it must be a finite number")


def warn_without_effect(args: argparse.Namespace) -> None:
    """Say which flags do nothing, and why.

    Args:
        args: With ``base`` and ``config``; ``adapter`` is None where the base alone is used, and
            ``output`` a model's or an image's name where there is one.

    Warns:
        UserWarning: One for each.
    """
    if args.adapter is None:
        for name, default in _OF_AN_ADAPTER.items():
            if getattr(args, name) != default:
                _warn(name, "no adapter is given")
    if args.config is None:
        return
    if not args.base.endswith(".safetensors"):
        _warn("config", "the base is not a single .safetensors file")
    elif Path(getattr(args, "output", "")).suffix == ".safetensors":
        _warn("config", "the output is a single file, which holds none")


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"{name} has no effect because {reason}", stacklevel=3)
