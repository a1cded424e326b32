"""AdaLoRA: ranks that move to the layers that need them (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from dora_diffusion.config.features.average import SCHEDULE_FREE
from dora_diffusion.config.features.feature import Added, Description, Excluded, Feature, Problem
from dora_diffusion.config.fields import Need, flag

_ON = Need("parametrization", ("adalora",))


def phases_of(config: Any) -> tuple[int, int]:
    """Return the number of steps before rank allocation begins, and after it ends."""
    steps, warmup, final = (
        config.max_train_steps or 0, config.allocation_warmup, config.allocation_final
    )  # fmt: skip
    return (steps // 10 if warmup is None else warmup, steps // 2 if final is None else final)


class AdaLoraFeature(Feature):
    """Ranks are allocated to layers by importance."""

    on, code = _ON, "adalora:AdaLoraCode"
    adds: ClassVar = {
        "parametrization": Added(
            ". adalora: A and B, whose ranks move to the layers that need them (AdaLoRA, "
            "arXiv:2303.10512)",
            choices=("adalora",),
        )
    }
    excludes: ClassVar = (
        Excluded("pack"),
        Excluded("run", "AdaLoRA switches triplets off, but the average of {config.optimizer} "
                 "would restore them; use optimizer adamw", "optimizer", SCHEDULE_FREE),
    )  # fmt: skip

    def problems(self, config: Any) -> Iterator[Problem]:
        if (config.target_rank or 0) > config.rank:
            yield (
                "target_rank",
                f"target_rank is {config.target_rank}, more than the initial rank {config.rank}; "
                "raise rank",
            )
        warmup, final = phases_of(config)
        if config.max_train_steps is not None and warmup + final >= config.max_train_steps:
            yield (
                "allocation_final",
                f"allocation_warmup {warmup} and allocation_final {final} leave none of "
                f"{config.max_train_steps} steps to allocate ranks in",
            )

    def describe(self, config: Any, run: Description) -> Description:
        ranks = f"ranks allocated to layers, from {config.rank}, convolutions {config.conv_rank}"
        return replace(run, ranks=ranks)


_allocation_flag = partial(flag, needs=(Need("method", ("dora", "lora")), _ON))


@dataclass(frozen=True, kw_only=True)
class AdaLoraSettings:
    """Rank allocation."""

    heading: ClassVar = "Adapter"
    common: ClassVar = {"after": "vera_rank"}
    belongs_to: ClassVar[Feature] = AdaLoraFeature()

    target_rank: int | None = _allocation_flag(
        None,
        "Average rank of Linear layers after rank allocation; Conv2d layers in proportion.",
        derived="two thirds of rank",
        above=0,
    )
    allocation_warmup: int | None = _allocation_flag(
        None, "Steps before rank allocation begins.", derived="a tenth of the steps", least=0
    )
    allocation_final: int | None = _allocation_flag(
        None, "Steps at the end with fixed ranks.", derived="half of the steps", least=0
    )
    allocation_interval: int = _allocation_flag(10, "Steps between rank allocations.", above=0)
    orthogonality_weight: float = _allocation_flag(
        0.5, "Weight of AdaLoRA's orthogonality term.", least=0
    )
