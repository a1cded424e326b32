"""Compilation of the denoiser's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dora_diffusion.config.features.feature import Excluded, Feature
from dora_diffusion.config.fields import Need, free_flag


class CompileFeature(Feature):
    """Steps run compiled."""

    on, code = Need("compile"), "compile:CompileCode"
    excludes: ClassVar = (
        Excluded("pack"),
        Excluded("sharding", "excludes compile: compiled blocks do not gather their weights"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """Compilation."""

    heading: ClassVar = "Memory and precision"
    belongs_to: ClassVar[Feature] = CompileFeature()

    compile: bool = free_flag(
        False,
        "Compile the denoiser's repeated blocks with torch.compile: faster steps on a GPU, but a "
        "slower start. Samples run uncompiled.",
        costs=True,
        after="gradient_checkpointing",
    )
