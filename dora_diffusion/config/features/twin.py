"""Twins: a model to sample on instead of the base, and an adapter under a distilled base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar

from dora_diffusion.config.features.feature import Description, Excluded, Feature
from dora_diffusion.config.fields import Need, TextOrPath, flag, free_flag

_SAMPLES = Need("num_validation_images")


class SampleModelFeature(Feature):
    """Samples are made on another model."""

    on, code = Need("sample_model"), "twin:SampleModelCode"
    excludes: ClassVar = (
        Excluded("run", "sample_model takes an adapter, and method full trains none; leave it out",
                 "method", ("full",)),
        Excluded("sharding", "excludes sample_model, which one process loads"),
    )  # fmt: skip


class AssistantFeature(Feature):
    """A frozen adapter acts in the steps of training alone."""

    on, code = Need("assistant_adapter"), "twin:AssistantCode"
    excludes: ClassVar = (
        Excluded("pack"),
        Excluded("run", "assistant_adapter acts under an adapter, and method full trains none; "
                 "leave it out", "method", ("full",)),
        Excluded("run", "assistant_adapter and compile exclude each other; leave one out",
                 "compile", (True,)),
        Excluded("sharding", "excludes assistant_adapter, which is not sharded"),
    )  # fmt: skip

    def describe(self, config: Any, run: Description) -> Description:
        name = PurePath(config.assistant_adapter).name
        return replace(run, metadata={**run.metadata, "assistant_adapter": name})


@dataclass(frozen=True, kw_only=True)
class SampleModelSettings:
    """Model of the samples."""

    heading: ClassVar = "Validation"
    belongs_to: ClassVar[Feature] = SampleModelFeature()

    sample_model: TextOrPath[str | None] = free_flag(
        None,
        "Sample on this model instead, such as the distilled twin of the base (Z-Image-Turbo for "
        "Z-Image), with its steps and guidance. It is loaded for each sampling, while the base is "
        "not on the GPU. Class images are the base's.",
        derived="the base model",
        needs=(_SAMPLES,),
        is_path=True,
        after="sample_prompts",
    )


@dataclass(frozen=True, kw_only=True)
class AssistantSettings:
    """Adapter under the trained one."""

    heading: ClassVar = "Adapter"
    belongs_to: ClassVar[Feature] = AssistantFeature()

    assistant_adapter: TextOrPath[str | None] = flag(
        None,
        "Frozen LoRA that acts while training, and neither in samples nor in files: a training "
        "adapter for a distilled base model, such as Z-Image-Turbo.",
        derived="none",
        is_path=True,
        after="init_adapter",
    )
