"""The DreamBooth dataset: photos of a subject, and class images beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dora_diffusion.data.crops import CropRecord, apply_crop, apply_crop_to_mask, latent_mask
from dora_diffusion.data.draws import SampleTransform
from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.data.photos import Photo, open_mask
from dora_diffusion.data.sampler import EpochIndex, EpochSampler

Planes = Callable[[Photo, CropRecord, int], Tensor]
"""A photo, its crop and the epoch -> further channels ``(k, H, W)`` of the crop's pixels."""


@dataclass(frozen=True)
class Sample:
    """One training sample, with its class image where prior preservation is on.

    Attributes:
        sample_id: Digest of the photo's bytes.
        caption: The prompt of this epoch.
        crop: How the pixels were cut.
        pixels: ``(3, H, W)`` in [-1, 1], and planes that the model reads besides; None where
            ``moments`` stand in for them.
        moments: What the autoencoder makes of the pixels, ``(2C, h, w)`` or more.
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
        pixels: ``(B, 3 or more, H, W)`` or None.
        moments: ``(B, 2C or more, h, w)`` or None; of pixels and moments exactly one is there.
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


class DreamBoothDataset(Dataset[Sample]):
    """Photos of a subject as training samples, drawn by seed, epoch and content."""

    def __init__(
        self,
        photos: Sequence[Photo],
        draws: SampleTransform,
        class_images: Sequence[Photo] = (),
        *,
        masked_loss: bool = True,
        planes: Planes | None = None,
    ) -> None:
        """Put photos and draws together; no file is opened.

        Args:
            photos: The photos of the subject.
            draws: How they are cut, mirrored and captioned.
            class_images: Pair each photo with one of these (prior preservation).
            masked_loss: The photos' masks say where to learn.
            planes: Further channels of the pixels, for models that read them.

        Raises:
            PhotoError: If there is no photo.
        """
        if not photos:
            raise PhotoError("no photos were given; choose at least one")
        self.photos, self.class_images, self.draws = list(photos), list(class_images), draws
        self._masked_loss, self._planes = masked_loss, planes
        self._encode: Callable[[Tensor], Tensor] | None = None
        self._cached: dict[tuple[object, ...], dict[str, Tensor | None]] = {}

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.photos)

    @property
    def captions(self) -> list[str]:
        """The photos' captions before dropout and shuffling, with each line and alternative."""
        return [c for photo in self.photos for c in self.draws.captions.variants(photo.caption)]

    def contents(self) -> dict[str, list[dict[str, str]]]:
        """What is trained on, in order: the record of each photo and class image."""
        return {
            "images": [
                photo.record() | {"caption": self.draws.captions.identity(photo.caption)}
                for photo in self.photos
            ],
            "class_images": [image.record() for image in self.class_images],
        }

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Per photo the crop size, which must be equal within a batch."""
        return [self.draws.target_size(photo) for photo in self.photos]

    def cache_moments(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Yield the autoencoder's moments instead of pixels, each kept in memory by its content.

        A mask is kept beside them at their size. Photo and mask are decoded only where the crop is
        not in the cache. Load in the main process (``num_workers=0``), where ``encode`` can use an
        accelerator.

        Args:
            encode: Pixels ``(B, 3 or more, H, W)`` to moments ``(B, 2C or more, h, w)``.
        """
        self._encode = encode

    def fill_cache(
        self, indices: Sequence[EpochIndex], on_crop: Callable[[int, int], None]
    ) -> None:
        """Encode every crop of these samples now, so that loading them encodes nothing.

        Args:
            indices: The samples that will be loaded.
            on_crop: Called with (crops encoded, crops in all).
        """
        crops = {self._key(*cut): cut for at in indices for cut in self._crops(at)}
        for number, cut in enumerate(crops.values(), start=1):
            self._content(*cut)
            on_crop(number, len(crops))

    def all_captions(self, indices: Sequence[EpochIndex]) -> set[str]:
        """The captions of these samples, as they are drawn, and those of their class images."""
        drawn = {self.draws.caption(self.photos[at.index], at.epoch) for at in indices}
        return drawn | {self._class_image(at).caption for at in indices if self.class_images}

    @property
    def caches_moments(self) -> bool:
        """Whether samples carry moments instead of pixels."""
        return self._encode is not None

    def __getitem__(self, index: int | EpochIndex) -> Sample:
        """The sample at an index, in the index's epoch; a plain number is of the first one."""
        at = index if isinstance(index, EpochIndex) else EpochIndex(0, index)
        photo = self.photos[at.index]
        crop = self.draws.crop(photo, at.epoch)
        return Sample(
            photo.digest,
            self.draws.caption(photo, at.epoch),
            crop,
            prior=self._prior(at, crop.target_size) if self.class_images else None,
            **self._content(photo, crop, at.epoch),
        )

    def _crops(self, at: EpochIndex) -> Iterator[tuple[Photo, CropRecord, int]]:
        """What a sample is cut from, and how: the photo, and the class image beside it."""
        photo = self.photos[at.index]
        crop = self.draws.crop(photo, at.epoch)
        yield photo, crop, at.epoch
        if self.class_images:
            image = self._class_image(at)
            yield image, self.draws.crop(image, at.epoch, crop.target_size), at.epoch

    def _class_image(self, at: EpochIndex) -> Photo:
        """The class image that goes with a photo: all have their turn, however few photos are."""
        turn = (at.epoch * len(self.photos) + at.index) % len(self.class_images)
        return self.class_images[turn]

    def _prior(self, at: EpochIndex, target_size: tuple[int, int]) -> Sample:
        """The class image that goes with a photo, cut to its size."""
        image = self._class_image(at)
        crop = self.draws.crop(image, at.epoch, target_size)
        content = self._content(image, crop, at.epoch)
        return Sample(image.digest, image.caption, crop, is_prior=True, **content)

    def _content(self, photo: Photo, crop: CropRecord, epoch: int) -> dict[str, Any]:
        """The pixels and the mask of a crop, or what is cached of both."""
        # By content and never by position, so that no order of access can mix entries.
        key = self._key(photo, crop, epoch)
        if key in self._cached:
            return self._cached[key]
        pixels = apply_crop(open_photo(photo.path), crop)
        if self._planes is not None:
            pixels = torch.cat([pixels, self._planes(photo, crop, epoch)])
        mask = None
        if self._masked_loss and (image := open_mask(photo)) is not None:
            mask = apply_crop_to_mask(image, crop)
        if self._encode is None:
            return {"pixels": pixels, "mask": mask}
        moments = self._encode(pixels.unsqueeze(0))[0].detach().cpu()
        if mask is not None:
            mask = latent_mask(mask, moments.shape[-2:])
        self._cached[key] = {"moments": moments, "mask": mask}
        return self._cached[key]

    def _key(self, photo: Photo, crop: CropRecord, epoch: int) -> tuple[object, ...]:
        """What a crop and its mask are cached by; an alpha channel has the photo's digest."""
        drawn = self._planes and self.draws.generator("planes", photo, epoch).initial_seed()
        return photo.digest, photo.mask_path is not None, photo.mask_digest, crop, drawn


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


def iterate_batches(
    dataset: DreamBoothDataset, sampler: EpochSampler, *, num_workers: int = 0
) -> Iterator[Batch]:
    """Load batches forever, keeping the sampler's state at what has been handed out.

    Save the sampler's state after training on a batch; resuming continues with the next.

    Raises:
        ValueError: If workers are asked for while the dataset encodes images itself.
    """
    if num_workers and dataset.caches_moments:
        raise ValueError("a dataset that encodes images must load in the main process (0 workers)")
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        # Its own: a loader otherwise draws from the global one when it starts.
        generator=torch.Generator(),
    )
    for batch in loader:
        sampler.advance()
        yield batch
