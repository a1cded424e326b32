"""Pixels to scaled latents, through any AutoencoderKL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_diffusion.models.transfer import send


def vae_factor(vae: Any) -> int:
    """Pixels per latent along one side (8 for the released models)."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def encode_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels ``(B, 3, H, W)`` in [-1, 1] to the posterior's moments ``(B, 2C, h, w)``.

    Moments (mean and log variance) are what a cache should hold: a latent can be drawn from them
    at every step, as training on the photos themselves would.
    """
    weight = next(vae.parameters())
    pixels = send(pixels, weight.device).to(weight.dtype)
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


def latents_from_moments(
    vae: Any, moments: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw scaled latents ``(B, C, h, w)`` from moments; the mode without a generator.

    The generator may live on the CPU while the moments are on an accelerator.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments)
    drawn: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
    shift, divisor = _statistics(vae, drawn)
    return (drawn - shift) / divisor * float(vae.config.scaling_factor)


def encode_images(vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Encode pixels ``(B, 3, H, W)`` in [-1, 1] to scaled latents ``(B, C, h, w)``.

    Args:
        vae: The autoencoder; pixels are cast to its dtype and device.
        pixels: Images whose sides are multiples of the autoencoder's factor.
        generator: Draws the latents from the posterior; None takes its mode.
    """
    return latents_from_moments(vae, encode_moments(vae, pixels), generator)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The shift and the divisor of raw latents, broadcastable to ``(B, C, h, w)``.

    Some autoencoders give one shift, others a mean and standard deviation per channel.
    """
    mean = getattr(vae.config, "latents_mean", None)
    std = getattr(vae.config, "latents_std", None)
    shift: Any = getattr(vae.config, "shift_factor", None) or 0.0
    if mean is not None and std is not None:
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)
    return like.new_tensor(shift), like.new_tensor(1.0)
