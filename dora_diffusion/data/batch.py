"""Samples and batches: what the dataset hands to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.data.crops import CropRecord


@dataclass(frozen=True)
class Sample:
    """One training sample, with its class image where prior preservation is on.

    Attributes:
        sample_id: Digest of the photo's bytes.
        caption: The prompt of this epoch.
        crop: How the pixels were cut.
        pixels: ``(3, H, W)`` in [-1, 1]; None where ``moments`` stand in for them.
        moments: The autoencoder's moments ``(2C, h, w)`` of the pixels.
        mask: ``(1, H, W)`` in [0, 1], where to learn; ``(1, h, w)`` beside moments that are cached.
            None means everywhere.
        is_prior: Whether this is a class image.
        prior: The class image that goes with this photo.
    """

    sample_id: str
    caption: str
    crop: CropRecord
    pixels: Tensor | None = None
    moments: Tensor | None = None
    mask: Tensor | None = None
    is_prior: bool = False
    prior: Sample | None = None


@dataclass(frozen=True)
class Batch:
    """Samples stacked: the photos first, then their class images in the same order.

    Attributes:
        sample_ids: B digests.
        captions: B prompts.
        crops: B crop records.
        is_prior: ``(B,)`` bool.
        pixels: ``(B, 3, H, W)`` or None.
        moments: ``(B, 2C, h, w)`` or None; of pixels and moments exactly one is there.
        mask: ``(B, 1, H, W)`` or ``(B, 1, h, w)``, or None where no sample has one.
    """

    sample_ids: list[str]
    captions: list[str]
    crops: list[CropRecord]
    is_prior: Tensor
    pixels: Tensor | None = None
    moments: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples, class images included."""
        return len(self.sample_ids)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples to a batch.

    Raises:
        ValueError: If their sizes differ.
    """
    priors = [sample.prior for sample in samples if sample.prior is not None]
    if priors and len(priors) != len(samples):
        raise ValueError("some of the batch's samples have a class image and some have none")
    rows = [*samples, *priors]
    sizes = {row.crop.target_size for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"a batch holds crops of different sizes: {sorted(sizes)}")
    return Batch(
        sample_ids=[row.sample_id for row in rows],
        captions=[row.caption for row in rows],
        crops=[row.crop for row in rows],
        is_prior=torch.tensor([row.is_prior for row in rows]),
        pixels=_stack([row.pixels for row in rows]),
        moments=_stack([row.moments for row in rows]),
        mask=_stack_masks(rows),
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if len(present) == len(tensors) else None


def _stack_masks(rows: Sequence[Sample]) -> Tensor | None:
    """Stack masks; samples without one count everywhere."""
    present = [row.mask for row in rows if row.mask is not None]
    if not present:
        return None
    ones = torch.ones_like(present[0])
    return torch.stack([ones if row.mask is None else row.mask for row in rows])
