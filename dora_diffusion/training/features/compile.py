"""Compilation of a run's denoiser."""

from __future__ import annotations

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler
from dora_diffusion.models.components import Components
from dora_diffusion.training.features.code import FeatureCode, Select
from dora_diffusion.training.trainable.adapters import StartingAdapter
from dora_diffusion.training.trainable.weights import TrainedWeights


class CompileCode(FeatureCode):
    """Compiled blocks in a run."""

    def check_model(self, components: Components) -> None:
        require_compiler(components.device)

    def weights(
        self, select: Select, components: Components, start: StartingAdapter | None
    ) -> TrainedWeights:
        weights = select()
        compile_blocks(components.denoiser)
        return weights
