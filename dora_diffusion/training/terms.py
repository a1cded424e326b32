"""Terms of the loss. Each requests predictions and computes the losses of rows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dora_diffusion.numerics.loss import denoising_loss, split_prior
from dora_diffusion.numerics.process import NoiseProcess
from dora_diffusion.training.batch import Batch, Rows
from dora_diffusion.training.prediction import Ask


class Losses(NamedTuple):
    """Unreduced losses of a term. All terms share one mean.

    Attributes:
        rows: Losses of the batch's rows, ``(B,)``. None: the term has no such losses.
        prior: Prior-preservation losses of n further rows, ``(n,)``. None: the term has none.
    """

    rows: Tensor | None = None
    prior: Tensor | None = None


class Term(Protocol):
    """Term of the loss."""

    def asks(self, batch: Batch) -> list[Ask]:
        """Return the predictions that the term needs, none if the batch has no loss of its kind."""

    def losses(self, batch: Batch, *predictions: Tensor) -> Losses:
        """Compute the losses from predictions in the order of `asks`, at least one."""


def squared_error(timesteps: Tensor) -> None:
    """Return the delta of a squared error, which has none (`RowLoss`)."""


@dataclass(frozen=True)
class RowLoss:
    """Loss of each row of a batch between predictions and targets.

    Attributes:
        process: Noise process of the model.
        snr_gamma: Gamma of min-SNR loss weighting; 0: no weights by timestep.
        delta: Function from timesteps to the delta of the Huber loss. Default: squared error.
    """

    process: NoiseProcess
    snr_gamma: float
    delta: Callable[[Tensor], Tensor | None] = squared_error

    def __call__(
        self,
        batch: Batch,
        predicted: Tensor,
        target: Tensor,
        *,
        rows: Rows = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the losses of rows, ``(rows,)``."""
        timesteps = batch.select(rows, batch.inputs.timesteps)
        weight = self.process.weight(timesteps, self.snr_gamma)
        return denoising_loss(predicted, target, weight, mask, self.delta(timesteps))


@dataclass(frozen=True)
class Denoising:
    """Denoising loss of all rows, inside their masks."""

    loss: RowLoss

    def asks(self, batch: Batch) -> list[Ask]:
        return [Ask(batch.captions)]

    def losses(self, batch: Batch, *predictions: Tensor) -> Losses:
        (predicted,) = predictions
        target = self.loss.process.target(batch.latents, batch.noise, batch.inputs.timesteps)
        return Losses(self.loss(batch, predicted, target, mask=batch.mask))


def mean_losses(batch: Batch, losses: Sequence[Losses]) -> tuple[Tensor, Tensor]:
    """Return the mean losses of the subject and of the prior, both scalar (`split_prior`)."""
    rows = reduce(add, [term.rows for term in losses if term.rows is not None])
    prior = [term.prior for term in losses if term.prior is not None]
    return split_prior(torch.cat([rows, *prior]) if prior else rows, batch.photos)
