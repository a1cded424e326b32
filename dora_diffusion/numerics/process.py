"""Noise processes: noisy latents, prediction targets and loss weights by timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dora_diffusion.numerics.loss import add_noise, huber_delta, min_snr, training_target


class NoiseProcess(Protocol):
    """Noise process of a model. Timesteps are ``(B,)`` int64."""

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents, ``(B, C, h, w)``."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the prediction, ``(B, C, h, w)``."""

    def weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor | None:
        """Return the loss weights of min-SNR, ``(B,)``; None if ``snr_gamma`` is 0."""

    def huber_delta(self, timesteps: Tensor, schedule: str, c: float) -> Tensor:
        """Return deltas of the Huber loss, ``(B,)``."""

    def spaced(self, count: int) -> Tensor:
        """Return evenly spaced timesteps to measure at, ``(count,)`` int64."""


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

    def weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor | None:
        if not snr_gamma:
            return None
        alpha_bar = self.alphas_cumprod[timesteps]
        return min_snr(alpha_bar / (1 - alpha_bar), self.prediction_type, snr_gamma)

    def huber_delta(self, timesteps: Tensor, schedule: str, c: float) -> Tensor:
        alpha_bar = self.alphas_cumprod[timesteps]
        return huber_delta(timesteps, alpha_bar, schedule, c, self.num_timesteps)

    def spaced(self, count: int) -> Tensor:
        return (_midpoints(count) * self.num_timesteps).long()


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al., arXiv:2209.03003): straight paths from images to noise.

    Timesteps increase with the noise, from 0 to ``num_timesteps - 1``.

    Attributes:
        num_timesteps: Length T of the schedule.
        shift: Shift of the schedule towards noise (Esser et al., arXiv:2403.03206, equation 23).
    """

    num_timesteps: int
    shift: float = 1.0

    def time(self, timesteps: Tensor) -> Tensor:
        """Return the share of noise s of each timestep in (0, 1], ``(B,)`` float32."""
        share = (timesteps.float() + 1) / self.num_timesteps
        return self.shift * share / (1 + (self.shift - 1) * share)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        share = self.time(timesteps).to(latents).view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor | None:
        """Return loss weights ``(B,)`` of the velocity; None if ``snr_gamma`` is 0.

        Weights are defined for errors of the noise. An error of the velocity is an error of the
        noise of ``1 - s`` times its size.
        """
        if not snr_gamma:
            return None
        share = self.time(timesteps)
        signal = (1 - share).square()
        return signal * min_snr(signal / share.square(), "epsilon", snr_gamma)

    def huber_delta(self, timesteps: Tensor, schedule: str, c: float) -> Tensor:
        share = self.time(timesteps)
        signal = (1 - share).square()
        # The alpha bar with the same ratio of signal to noise.
        alpha_bar = signal / (signal + share.square())
        return huber_delta(timesteps, alpha_bar, schedule, c, self.num_timesteps)

    def spaced(self, count: int) -> Tensor:
        """Return timesteps with evenly spaced shares of noise.

        With a shift of 3, half of the timesteps have a share above 0.75.
        """
        share = _midpoints(count)
        share = share / (self.shift - (self.shift - 1) * share)
        return (share * self.num_timesteps).long()


def _midpoints(count: int) -> Tensor:
    """Return the middles of equal parts of [0, 1], ``(count,)``."""
    return (torch.arange(count) + 0.5) / count
