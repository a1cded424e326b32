"""Compilation of a run's denoiser."""

from __future__ import annotations

import torch

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.trainable.adapters import StartingAdapter
from dora_diffusion.training.trainable.weights import TrainedWeights


class CompileCode(FeatureCode):
    """Compiled blocks in a run."""

    def check_device(self, device: torch.device) -> None:
        require_compiler(device)

    def extend(self, weights: TrainedWeights, start: StartingAdapter | None) -> TrainedWeights:
        compile_blocks(weights.components.denoiser)
        return weights
