"""Contradictions between the settings of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

from dora_diffusion.config.features.feature import Problem
from dora_diffusion.config.images import PIXELS, SAFE_STEP, near_side


def contradictions(config: Any) -> Iterator[Problem]:
    """Yield the first contradiction of each part of a `TrainConfig`; its others may follow."""
    checks: dict[Callable[[Any], Iterator[Problem]], bool] = {
        _resolution: bool(config.resolution),
        _hub: config.push_to_hub,
        _prodigy: config.is_prodigy,
    }
    own = (check(config) for check, applies in checks.items() if applies)
    for problems in chain(own, (one.problems(config) for one in config.features)):
        yield from islice(problems, 1)


def _resolution(config: Any) -> Iterator[Problem]:
    if config.resolution % PIXELS:
        yield (
            "resolution",
            f"resolution is {config.resolution}; it must be a multiple of {PIXELS}, such as "
            f"{near_side(config.resolution, SAFE_STEP)}",
        )


def _hub(config: Any) -> Iterator[Problem]:
    if "/" not in (config.hub_model_id or ""):
        yield "push_to_hub", "push_to_hub needs --hub_model_id NAME/MODEL"


def _prodigy(config: Any) -> Iterator[Problem]:
    if config.unet_lr < 0.1:
        yield (
            "learning_rate",
            f"learning_rate is {config.unet_lr}, but Prodigy estimates the rate and multiplies it "
            "by learning_rate; use 1",
        )
    if config.magnitude_lr is not None or config.loraplus_ratio != 1 or config.lr_pattern:
        yield (
            "optimizer",
            "Prodigy has one rate for all parameters; leave out magnitude_lr, loraplus_ratio and "
            "lr_pattern",
        )
