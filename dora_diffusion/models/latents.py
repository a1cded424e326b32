"""Encoding of pixels to moments of the posterior of a VAE, and scaled latents drawn from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from dora_diffusion.config.families import Family
from dora_diffusion.models.offload import send


def encode_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels ``(B, 3, H, W)`` in [-1, 1] to moments of the posterior ``(B, 2C, h, w)``.

    A cache should store moments (mean and log variance) instead of latents, so that a new latent
    can be drawn at every step.
    """
    weight = next(vae.parameters())
    pixels = send(pixels, weight.device).to(weight.dtype)
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


def encode_inputs(vae: Any, family: Family, pixels: Tensor) -> Tensor:
    """Encode the inputs of the denoiser from pixels ``(B, 3 + mask_channels, H, W)``.

    A missing mask is set to 1.

    Returns:
        ``(B, n, h, w)``: the moments of the image, the mask (downsampled by nearest neighbour) and
        the moments of the conditioning images.
    """
    if not family.mask_channels + family.conditioning_latents:
        return encode_moments(vae, pixels)
    missing = 3 + family.mask_channels - pixels.shape[1]
    pixels = nn.functional.pad(pixels, (0, 0, 0, 0, 0, missing), value=1.0)
    image, *conditioning = (encode_moments(vae, image) for image in family.images(pixels))
    mask_channels = nn.functional.interpolate(pixels[:, 3:], size=image.shape[-2:])
    return torch.cat([image, mask_channels.to(image), *conditioning], dim=1)


def condition_from_moments(
    vae: Any, family: Family, moments: Tensor, generator: torch.Generator | None = None
) -> Tensor | None:
    """Draw the denoiser's inputs after the noisy latents from the moments of `encode_inputs`.

    Returns:
        Mask and conditioning latents, ``(B, n, h, w)``; None if the denoiser has no such inputs.
    """
    width = 2 * int(vae.config.latent_channels)
    mask_channels, images = moments[:, width:].tensor_split([family.mask_channels], dim=1)
    if not mask_channels.shape[1] + images.shape[1]:
        return None
    latents = (latents_from_moments(vae, m, generator) for m in images.split(width, dim=1))
    return torch.cat([mask_channels, *latents], dim=1)


def latents_from_moments(
    vae: Any, moments: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw scaled latents ``(B, C, h, w)`` from the moments of an image.

    Args:
        vae: The autoencoder.
        moments: Moments in the first channels; further channels are ignored.
        generator: Generator on any device. None: the mode of the posterior.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments[:, : 2 * vae.config.latent_channels])
    drawn: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
    if (bn := getattr(vae, "bn", None)) is not None:  # FLUX.2: statistics of patches of 2 x 2.
        statistics = (bn.running_mean, bn.running_var)
        average, variance = (tensor.to(drawn).view(1, -1, 1, 1) for tensor in statistics)
        patches: Tensor = (pixel_unshuffle(drawn, 2) - average) / (variance + bn.eps).sqrt()
        return patches
    # Some autoencoders have one shift, others a mean and standard deviation per channel.
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    shift = drawn.new_tensor(getattr(vae.config, "shift_factor", None) or 0.0)
    divisor = drawn.new_tensor(1.0)
    if mean is not None and std is not None:
        shift, divisor = (drawn.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (drawn - shift) / divisor * float(vae.config.scaling_factor)
