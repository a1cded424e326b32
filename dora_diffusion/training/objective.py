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
        words: Vectors of new words that train, in the text encoders.
    """

    def __init__(
        self,
        components: Components,
        *,
        train_text_encoder: bool,
        snr_gamma: float,
        debiased: bool = False,
        base_weights: Callable[[], AbstractContextManager[None]] | None = None,
        words: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.unet = components.unet
        encodes = train_text_encoder or words
        self.text_encoders = nn.ModuleList(components.text_encoders if encodes else [])
        self.words = words
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
            self._predict(noisy_latents, inputs),
            inputs.latents,
            inputs.noise,
            alpha_bar,
            prediction_type=self.prediction_type,
            weight=weight,
            mask=inputs.mask,
        )
        if (of_class := inputs.of_class()) is not None:
            held, rows = of_class
            of_rows = None if weight is None else weight[rows]
            prior = self._image_free_prior(noisy_latents[rows], held, of_rows)
            per_sample = torch.cat([per_sample, prior])
        subject, prior = split_prior(per_sample, inputs.photos, inputs.weights)
        for vectors in self.words:  # Used by every batch, whatever its captions: a gradient of 0.
            subject = subject + 0 * vectors.sum()
        return subject, prior

    def _predict(self, noisy_latents: Tensor, inputs: StepInputs) -> Tensor:
        conditioning = self.condition(inputs.captions)
        return predict(
            self.unet,
            noisy_latents,
            inputs.timesteps,
            conditioning,
            inputs.time_ids,
            inputs.condition,
        )

    def _image_free_prior(
        self, noisy_latents: Tensor, of_class: StepInputs, weight: Tensor | None
    ) -> Tensor:
        """Hold the predictions for class captions at those of the untrained model: ``(rows,)``."""
        with torch.no_grad(), self.base_weights():
            target = self._predict(noisy_latents, of_class)
        model_pred = self._predict(noisy_latents, of_class)
        return denoising_loss(model_pred, target, weight)
