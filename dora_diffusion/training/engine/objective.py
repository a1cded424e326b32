"""The training loss, of the batches of one run or of several in one pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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
from dora_diffusion.training.inputs.draws import Conditioner, StepInputs

Base = Callable[[], AbstractContextManager[object]]


class HeldPrior(NamedTuple):
    """Predictions for class captions, which preserve the prior without images.

    Attributes:
        rows: The photos that they belong to.
        model_pred: ``(rows, C, h, w)``.
        target: Those of the untrained model, at which they are held.
    """

    rows: slice | Tensor
    model_pred: Tensor
    target: Tensor


@dataclass(frozen=True)
class Objective:
    """Parts of a run's loss.

    Attributes:
        components: The model.
        condition: Encodes captions.
        alphas_cumprod: Of the noise schedule, on the model's device.
        base_weights: The model is its base inside of this.
        weightings: Of the loss by timestep, as in `loss_weight`.
        words: Vectors of new words that train, in the text encoders.
    """

    components: Components
    condition: Conditioner
    alphas_cumprod: Tensor
    base_weights: Base
    weightings: Mapping[str, float]
    words: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls,
        components: Components,
        base_weights: Base,
        *,
        train_text_encoder: bool,
        weightings: Mapping[str, float],
        words: Sequence[Tensor] = (),
    ) -> Objective:
        """Return the objective of a model, with text encoders that train or do not."""
        alphas_cumprod = components.scheduler.alphas_cumprod.to(components.device)
        condition = Conditioner(components, train_text_encoder)
        return cls(components, condition, alphas_cumprod, base_weights, weightings, words)

    def losses(
        self, inputs: StepInputs, alpha_bar: Tensor, model_pred: Tensor, held: HeldPrior | None
    ) -> tuple[Tensor, Tensor]:
        """Loss of the subject and of the prior, both scalar, from predictions.

        Args:
            inputs: What they are of.
            alpha_bar: ``(B,)``, at the inputs' timesteps.
            model_pred: ``(B, C, h, w)``.
            held: Predictions for class captions, where an image-free prior is held.
        """
        kind = self.components.prediction_type
        weight = loss_weight(alpha_bar, kind, self.weightings)
        per_sample = prediction_loss(
            model_pred,
            inputs.latents,
            inputs.noise,
            alpha_bar,
            prediction_type=kind,
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


class NoisyBatch(NamedTuple):
    """A batch of one run whose latents are noisy already.

    Attributes:
        objective: The run's.
        inputs: What it is of.
        alpha_bar: ``(B,)``, at its timesteps.
        latents: ``(B, C, h, w)``, noisy.
        rows: Those of a batch whose image-free prior is held; of the batch itself all.
    """

    objective: Objective
    inputs: StepInputs
    alpha_bar: Tensor
    latents: Tensor
    rows: slice | Tensor = slice(None)

    def of_class(self) -> NoisyBatch | None:
        """The rows whose image-free prior is held, with class captions."""
        if (found := self.inputs.of_class()) is None:
            return None
        inputs, rows = found
        return self._replace(inputs=inputs, latents=self.latents[rows], rows=rows)


def noisy_batches(
    objectives: Sequence[Objective], given: Sequence[StepInputs]
) -> tuple[list[NoisyBatch], list[NoisyBatch | None]]:
    """Batches of one size, one of each run, and of each the part whose image-free prior is held."""
    merged = StepInputs.cat(given)
    counts = [len(inputs.captions) for inputs in given]
    alpha_bar = objectives[0].alphas_cumprod[merged.timesteps]
    noisy = add_noise(merged.latents, merged.noise, alpha_bar).split(counts)
    each = zip(objectives, given, alpha_bar.split(counts), noisy, strict=True)
    own = [NoisyBatch(*parts) for parts in each]
    return own, [batch.of_class() for batch in own]


def losses_of(
    own: Sequence[NoisyBatch], held: Sequence[NoisyBatch | None], base: Base
) -> list[tuple[Tensor, Tensor]]:
    """Losses of each run's subject and prior: one pass of the model, and one of its base.

    Its rows are those of the batches, then those of the held ones.

    Args:
        own: A batch of each run.
        held: Of each the part whose image-free prior is held.
        base: The model has no adapter of any row inside of this.
    """
    of_class = [batch for batch in held if batch is not None]
    targets: Sequence[Tensor] = ()
    if of_class:
        with torch.no_grad(), base(), ExitStack() as stack:
            for batch in of_class:
                stack.enter_context(batch.objective.base_weights())
            targets = predictions_of(of_class)
    predictions = predictions_of([*own, *of_class])
    priors = iter(zip(predictions[len(own) :], targets, strict=True))
    losses = []
    for batch, part, made in zip(own, held, predictions, strict=False):
        prior = None if part is None else HeldPrior(part.rows, *next(priors))
        losses.append(batch.objective.losses(batch.inputs, batch.alpha_bar, made, prior))
    return losses


def predictions_of(batches: Sequence[NoisyBatch]) -> Sequence[Tensor]:
    """The UNet's predictions ``(B, C, h, w)`` of each batch, from one pass of all."""
    first, every = batches[0].objective, [batch.inputs for batch in batches]
    if first.condition.trains:
        conditioning = first.condition([c for inputs in every for c in inputs.captions])
    else:
        # What each has cached.
        each = [batch.objective.condition(batch.inputs.captions) for batch in batches]
        conditioning = Conditioning.cat(each)
    merged = StepInputs.cat(every)
    made = predict(
        first.components.unet,
        torch.cat([batch.latents for batch in batches]),
        merged.timesteps,
        conditioning,
        merged.time_ids,
        merged.condition,
    )
    return made.split([len(inputs.captions) for inputs in every])
