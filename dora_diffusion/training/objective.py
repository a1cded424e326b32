"""The training loss as one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import predict
from dora_diffusion.numerics.loss import (
    add_noise,
    denoising_loss,
    loss_weight,
    prediction_loss,
    split_prior,
)
from dora_diffusion.training.inputs import Conditioner, StepInputs


class Objective(nn.Module):
    """The loss as one module, so that data-parallel wrappers see every parameter that trains.

    Args:
        components: The model.
        train_text_encoder: Whether the text encoders train.
        snr_gamma: Of min-SNR weighting; 0 turns it off.
        debiased: Weigh by debiased estimation instead.
        base_weights: The model is its base inside of this. None switches adapters off.
    """

    def __init__(
        self,
        components: Components,
        *,
        train_text_encoder: bool,
        snr_gamma: float,
        debiased: bool = False,
        base_weights: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__()
        self.unet = components.unet
        self.text_encoders = nn.ModuleList(components.text_encoders if train_text_encoder else [])
        self.condition = Conditioner(components, train_text_encoder)
        self.prediction_type = components.prediction_type
        self.loss_weight = partial(
            loss_weight,
            snr_gamma=snr_gamma,
            prediction_type=components.prediction_type,
            debiased=debiased,
        )
        self.base_weights = base_weights or partial(disabled, *components.adaptable().values())
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", components.scheduler.alphas_cumprod)

    def forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior, both scalar."""
        alpha_bar = self.alphas_cumprod[inputs.timesteps]
        noisy_latents = add_noise(inputs.latents, inputs.noise, alpha_bar)
        weight = self.loss_weight(alpha_bar)
        per_sample = prediction_loss(
            self._predict(noisy_latents, inputs, inputs.captions),
            inputs.latents,
            inputs.noise,
            alpha_bar,
            prediction_type=self.prediction_type,
            weight=weight,
            mask=inputs.mask,
        )
        subject, prior = split_prior(per_sample, inputs.photos)
        if inputs.class_captions is not None:
            prior = self._image_free_prior(noisy_latents, inputs, inputs.class_captions, weight)
        return subject, prior

    def _predict(
        self, noisy_latents: Tensor, inputs: StepInputs, captions: Sequence[str]
    ) -> Tensor:
        conditioning = self.condition(captions)
        return predict(
            self.unet,
            noisy_latents,
            inputs.timesteps,
            conditioning,
            inputs.time_ids,
            inputs.condition,
        )

    def _image_free_prior(
        self,
        noisy_latents: Tensor,
        inputs: StepInputs,
        class_captions: Sequence[str],
        weight: Tensor | None,
    ) -> Tensor:
        """Hold the prediction for the class caption at that of the untrained model."""
        with torch.no_grad(), self.base_weights():
            target = self._predict(noisy_latents, inputs, class_captions)
        model_pred = self._predict(noisy_latents, inputs, class_captions)
        return denoising_loss(model_pred, target, weight).mean()
