"""Terms of prior preservation, without class images and outside of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dora_diffusion.training.batch import Batch
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.prediction import Ask
from dora_diffusion.training.terms import Losses, RowLoss, Term


class ImageFreeCode(FeatureCode):
    """Prior preservation without class images in a run."""

    def terms(self, loss: RowLoss) -> Sequence[Term]:
        return [Prior(loss)]


class UnmaskedCode(FeatureCode):
    """Prior preservation outside of masks in a run."""

    def terms(self, loss: RowLoss) -> Sequence[Term]:
        return [Unmasked(loss, self.config.unmasked_prior)]


@dataclass(frozen=True)
class Prior:
    """Prior preservation without class images: match the base's predictions for class captions."""

    loss: RowLoss

    def asks(self, batch: Batch) -> list[Ask]:
        captions = batch.class_captions
        if not captions:
            return []
        return [Ask.by_row(batch, captions), Ask.by_row(batch, captions, of_base=True)]

    def losses(self, batch: Batch, *predictions: Tensor) -> Losses:
        predicted, base = predictions
        rows = batch.rows(batch.class_captions)
        return Losses(prior=self.loss(batch, predicted, base, rows=rows))


@dataclass(frozen=True)
class Unmasked:
    """Prior preservation outside the masks: match the base's predictions there."""

    loss: RowLoss
    weight: float

    def asks(self, batch: Batch) -> list[Ask]:
        captions = {row: batch.captions[row] for row in batch.masked_rows}
        if not captions:
            return []
        return [Ask(batch.captions), Ask.by_row(batch, captions, of_base=True)]

    def losses(self, batch: Batch, *predictions: Tensor) -> Losses:
        predicted, base = predictions
        assert batch.mask is not None
        rows, mask = batch.rows(batch.masked_rows), 1 - batch.mask
        predicted, mask = batch.select(rows, predicted), batch.select(rows, mask)
        losses = self.loss(batch, predicted, base, rows=rows, mask=mask)
        if rows is not None:
            index = (batch.index_of(rows),)
            losses = losses.new_zeros(len(batch.captions)).index_put(index, losses)
        return Losses(self.weight * losses)
