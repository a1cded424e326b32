"""The UNet's prediction from noisy latents and conditioning: the one place that calls a UNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dora_diffusion.models.text import Conditioning


def predict(
    unet: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    time_ids: Tensor | None = None,
) -> Tensor:
    """The UNet's prediction (noise or velocity, by its prediction type), ``(B, C, h, w)``.

    Args:
        unet: A ``UNet2DConditionModel``, with whatever adapters are on it. Inputs are cast to its
            dtype.
        noisy_latents: ``(B, C, h, w)``.
        timesteps: ``(B,)`` int64.
        conditioning: Of B prompts.
        time_ids: SDXL's size and crop conditioning, ``(B, 6)``; None for other families.
    """
    # Diffusers' `unet.dtype` looks at every module, at each step: the first weight's is the same.
    dtype = next(unet.parameters()).dtype
    conditioning = conditioning.to(noisy_latents.device, dtype)
    prediction: Tensor = unet(
        noisy_latents.to(dtype),
        timesteps,
        conditioning.encoder_hidden_states,
        added_cond_kwargs=conditioning.added_cond_kwargs(time_ids),
    ).sample
    return prediction
