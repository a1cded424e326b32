"""Noise processes: noisy latents, prediction targets and loss weights by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dora_diffusion.numerics.loss import add_noise, huber_delta, loss_weight, training_target


class NoiseProcess(Protocol):
    """Noise process of a model. Timesteps are ``(B,)`` int64."""

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents, ``(B, C, h, w)``."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the prediction, ``(B, C, h, w)``."""

    def weight(self, timesteps: Tensor, weightings: Mapping[str, float]) -> Tensor | None:
        """Return loss weights ``(B,)``; None if all are 1."""

    def huber_delta(self, timesteps: Tensor, schedule: str, c: float) -> Tensor:
        """Return deltas of the Huber loss, ``(B,)``."""


@dataclass(frozen=True)
class Diffusion:
    """Variance-preserving diffusion (Ho et al., arXiv:2006.11239, equation 4).

    Attributes:
        alphas_cumprod: Cumulative products of alphas by timestep, ``(T,)``, on the device of the
            latents.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(latents, noise, self.alphas_cumprod[timesteps])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return training_target(self.prediction_type, latents, noise, self.alphas_cumprod[timesteps])

    def weight(self, timesteps: Tensor, weightings: Mapping[str, float]) -> Tensor | None:
        if not weightings:
            return None
        return loss_weight(self.alphas_cumprod[timesteps], self.prediction_type, weightings)

    def huber_delta(self, timesteps: Tensor, schedule: str, c: float) -> Tensor:
        alpha_bar = self.alphas_cumprod[timesteps]
        return huber_delta(timesteps, alpha_bar, schedule, c, self.num_timesteps)
