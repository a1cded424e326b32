"""Averages of the trained weights: exponential, or a schedule-free optimizer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dora_diffusion.config.features.feature import Excluded, Feature
from dora_diffusion.config.fields import Need, flag

SCHEDULE_FREE = ("adamw-schedule-free", "prodigy-schedule-free")


class EmaFeature(Feature):
    """Samples, validation and files use an exponential moving average of the weights."""

    on, code = Need("ema_decay"), "average:EmaCode"


class ScheduleFreeFeature(Feature):
    """They use the average that the optimizer keeps."""

    on, code = Need("optimizer", SCHEDULE_FREE), "average:ScheduleFreeCode"
    excludes: ClassVar = (
        Excluded("run", "lr_scheduler is {config.lr_scheduler}, but {config.optimizer} supports no "
                 "schedule, only a warm-up; leave it out", "lr_scheduler",
                 when=lambda config: not config.lr_scheduler.startswith("constant")),
        Excluded("run", "{config.optimizer} averages the weights itself; leave ema_decay out",
                 "ema_decay", when=lambda config: config.ema_decay is not None),
        Excluded("run", "adam_beta1 is {config.adam_beta1:g}; for {config.optimizer} it must be "
                 "greater than 0", "adam_beta1", when=lambda config: config.adam_beta1 <= 0),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """Moving average of the weights."""

    heading: ClassVar = "Optimization"
    belongs_to: ClassVar[Feature] = EmaFeature()

    ema_decay: float | None = flag(
        None,
        "Decay of an exponential moving average (EMA) of the weights; after n steps at most "
        "(1 + n) / (10 + n). Samples, validation and files use the average.",
        least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSettings:
    """Schedule-free optimizers, whose settings are those of their relatives."""

    heading: ClassVar = "Optimization"
    belongs_to: ClassVar[Feature] = ScheduleFreeFeature()
