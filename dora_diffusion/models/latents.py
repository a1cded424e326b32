"""Pixels to scaled latents, through any AutoencoderKL, and the UNet's prediction from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.config.families import Family
from dora_diffusion.models.offload import send
from dora_diffusion.models.text import Conditioning


def encode_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels ``(B, 3, H, W)`` in [-1, 1] to the posterior's moments ``(B, 2C, h, w)``.

    Moments (mean and log variance) are what a cache should hold: a latent can be drawn from them
    at every step, as training on the photos themselves would.
    """
    weight = next(vae.parameters())
    pixels = send(pixels, weight.device).to(weight.dtype)
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


def encode_inputs(vae: Any, family: Family, pixels: Tensor) -> Tensor:
    """Encode all that the family's UNet reads of pixels ``(B, 3 + mask_channels, H, W)``.

    A mask that is missing is 1.

    Returns:
        ``(B, n, h, w)``: the moments of the image, the mask (the pixel in each corner), and the
        moments of the images that condition the UNet.
    """
    if not family.mask_channels + family.conditioning_latents:
        return encode_moments(vae, pixels)
    missing = 3 + family.mask_channels - pixels.shape[1]
    pixels = nn.functional.pad(pixels, (0, 0, 0, 0, 0, missing), value=1.0)
    image, *others = (encode_moments(vae, each) for each in family.images(pixels))
    mask_channels = nn.functional.interpolate(pixels[:, 3:], size=image.shape[-2:])
    return torch.cat([image, mask_channels.to(image), *others], dim=1)


def condition_from_moments(
    vae: Any, family: Family, moments: Tensor, generator: torch.Generator | None = None
) -> Tensor | None:
    """Return the UNet's inputs besides noisy latents, from `encode_inputs`; None if nothing.

    Returns:
        ``(B, n, h, w)``: the mask, then latents, drawn as `latents_from_moments` draws them.
    """
    width = 2 * int(vae.config.latent_channels)
    mask_channels, others = moments[:, width:].tensor_split([family.mask_channels], dim=1)
    if not mask_channels.shape[1] + others.shape[1]:
        return None
    latents = (latents_from_moments(vae, m, generator) for m in others.split(width, dim=1))
    return torch.cat([mask_channels, *latents], dim=1)


def latents_from_moments(
    vae: Any, moments: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw scaled latents ``(B, C, h, w)`` from an image's moments; the mode without a generator.

    The moments are the first channels. The generator may live on the CPU while they are on an
    accelerator.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments[:, : 2 * vae.config.latent_channels])
    drawn: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
    # Some autoencoders give one shift, others a mean and standard deviation per channel.
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    shift = drawn.new_tensor(getattr(vae.config, "shift_factor", None) or 0.0)
    divisor = drawn.new_tensor(1.0)
    if mean is not None and std is not None:
        shift, divisor = (drawn.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
    return (drawn - shift) / divisor * float(vae.config.scaling_factor)


def predict(
    unet: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The UNet's prediction (noise or velocity, by its prediction type), ``(B, C, h, w)``.

    Args:
        unet: A ``UNet2DConditionModel``, with whatever adapters are on it. Inputs are cast to its
            dtype.
        noisy_latents: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        conditioning: Of B prompts.
        time_ids: SDXL's size and crop conditioning, ``(B, 6)``; None for other families.
        condition: What it reads besides (`condition_from_moments`), ``(B, n, h, w)``.
    """
    # Diffusers' `unet.dtype` looks at every module, at each step: the first weight's is the same.
    dtype = next(unet.parameters()).dtype
    conditioning = conditioning.to(noisy_latents.device, dtype)
    if condition is not None:
        noisy_latents = torch.cat([noisy_latents, condition], dim=1)
    prediction: Tensor = unet(
        noisy_latents.to(dtype),
        timesteps,
        conditioning.encoder_hidden_states,
        added_cond_kwargs=conditioning.added_cond_kwargs(time_ids),
    ).sample
    return prediction
