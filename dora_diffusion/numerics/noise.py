"""Timesteps and noise, each drawn from its own generator, and the forward process."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_timestep(num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep, uniform over the schedule: scalar int64."""
    return torch.randint(num_train_timesteps, (), generator=generator)


def sample_noise(
    shape: tuple[int, int, int], generator: torch.Generator, offset: float = 0.0
) -> Tensor:
    """Noise of one latent ``(C, h, w)``, float32 on the generator's device.

    Args:
        shape: ``(C, h, w)``.
        generator: Source of the draw.
        offset: Share of an additional draw that is constant over each channel, with which a model
            learns to change the mean of an image (https://www.crosslabs.org/blog/
            diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if offset:
        constant = torch.randn((shape[0], 1, 1), generator=generator, device=generator.device)
        noise = noise + offset * constant
    return noise


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process, ``sqrt(a) latents + sqrt(1 - a) noise``: ``(B, C, h, w)``.

    Args:
        latents: ``(B, C, h, w)``.
        noise: ``(B, C, h, w)``, standard normal.
        alpha_bar: Cumulative product of alphas at each sample's timestep, ``(B,)`` (Ho et al.,
            arXiv:2006.11239, equation 4).
    """
    a = alpha_bar.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return a.sqrt() * latents + (1 - a).sqrt() * noise
