"""The training loss as one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import predict
from dora_diffusion.models.text import Conditioning
from dora_diffusion.numerics.loss import (
    add_noise,
    denoising_loss,
    loss_weight,
    prediction_loss,
    split_prior,
)
from dora_diffusion.training.inputs import Conditioner, StepInputs


class HeldPrior(NamedTuple):
    """What holds the prior without images: predictions for class captions.

    Attributes:
        rows: The photos that they belong to.
        model_pred: ``(rows, C, h, w)``.
        target: Those of the untrained model, at which they are held.
    """

    rows: slice | Tensor
    model_pred: Tensor
    target: Tensor


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
        model_pred, held = self._predict(noisy_latents, inputs), None
        if (of_class := inputs.of_class()) is not None:
            class_inputs, rows = of_class
            noisy_rows = noisy_latents[rows]
            with torch.no_grad(), self.base_weights():
                target = self._predict(noisy_rows, class_inputs)
            held = HeldPrior(rows, self._predict(noisy_rows, class_inputs), target)
        return self.losses(inputs, alpha_bar, model_pred, held)

    def losses(
        self, inputs: StepInputs, alpha_bar: Tensor, model_pred: Tensor, held: HeldPrior | None
    ) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior from predictions.

        Args:
            inputs: What they are of.
            alpha_bar: ``(B,)``, at the inputs' timesteps.
            model_pred: ``(B, C, h, w)``.
            held: Predictions for class captions, where an image-free prior is held.
        """
        weight = self.loss_weight(alpha_bar)
        per_sample = prediction_loss(
            model_pred,
            inputs.latents,
            inputs.noise,
            alpha_bar,
            prediction_type=self.prediction_type,
            weight=weight,
            mask=inputs.mask,
        )
        if held is not None:
            of_rows = None if weight is None else weight[held.rows]
            prior = denoising_loss(held.model_pred, held.target, of_rows)
            per_sample = torch.cat([per_sample, prior])
        subject, prior = split_prior(per_sample, inputs.photos, inputs.weights)
        for vectors in self.words:  # Used by every batch, whatever its captions: a gradient of 0.
            subject = subject + 0 * vectors.sum()
        return subject, prior

    def _predict(self, noisy_latents: Tensor, inputs: StepInputs) -> Tensor:
        return self.predict(noisy_latents, inputs, self.condition(inputs.captions))

    def predict(
        self, noisy_latents: Tensor, inputs: StepInputs, conditioning: Conditioning
    ) -> Tensor:
        """The UNet's prediction ``(B, C, h, w)`` for inputs whose captions are encoded."""
        return predict(
            self.unet,
            noisy_latents,
            inputs.timesteps,
            conditioning,
            inputs.time_ids,
            inputs.condition,
        )
