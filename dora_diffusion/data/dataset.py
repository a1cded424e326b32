"""DreamBooth dataset: photos of one or several subjects, random draws, class images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.crops import (
    CropRecord,
    apply_crop,
    apply_crop_to_mask,
    latent_mask,
    plan_crop,
)
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, open_mask
from dora_diffusion.data.sampler import EpochIndex, EpochSampler, generator_for

MaskChannels = Callable[[Photo, CropRecord, int], Tensor]
"""(photo, crop, epoch) -> additional channels ``(k, H, W)`` of the crop's pixels."""

# Fraction of random masks that cover the image, as for Stable Diffusion 1.5 Inpainting.
_FULL_MASK_SHARE = 0.25
# Number of crops of which a mask must be bright in at least one.
_CHECKED_CROPS = 8


@dataclass(frozen=True)
class SampleTransform:
    """Draws of crops and captions that depend only on seed, epoch and the photo's digest.

    Draws do not depend on order of access, number of workers or other photos, so a resumed run
    gets the same samples as an uninterrupted one.

    Attributes:
        resolution: Side of the square crops in pixels.
        seed: Random seed of all draws.
        multiple: Pixels per latent of the model; sides must be multiples of it.
        buckets: Photo size -> crop size, for aspect-ratio buckets; overrides ``resolution``.
        center_crop: Center crops instead of random crops.
        random_flip: Mirror half of the samples.
        crop_variants: Draw from this number of fixed crops per photo, so that their latents can be
            cached; None: draw a new crop every time.
        captions: Rules of drawing captions.

    Raises:
        ValueError: If the resolution does not fit the model.
    """

    resolution: int
    _: KW_ONLY
    seed: int = 0
    multiple: int = 8
    buckets: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    center_crop: bool = True
    random_flip: bool = False
    crop_variants: int | None = None
    captions: CaptionRules = field(default_factory=CaptionRules)

    def __post_init__(self) -> None:
        """Check that the resolution is a multiple of the model's pixels per latent."""
        plan_crop((self.resolution, self.resolution), self.resolution, multiple=self.multiple)

    def target_size(self, photo: Photo) -> tuple[int, int]:
        """Crop size ``(height, width)`` of a photo."""
        return self.buckets(photo.size) if self.buckets else (self.resolution, self.resolution)

    def crop(
        self, photo: Photo, epoch: int, target_size: tuple[int, int] | None = None
    ) -> CropRecord:
        """Draw the crop of a photo in an epoch; position and flip have separate generators."""
        crop = plan_crop(
            photo.size,
            target_size or self.target_size(photo),
            generator=None if self.center_crop else self.generator("crop", photo, epoch),
            multiple=self.multiple,
        )
        coin = generator_for("flip", self.seed, epoch, photo.digest)
        flipped = self.random_flip and torch.rand((), generator=coin).item() < 0.5
        return replace(crop, flipped=flipped)

    def generator(self, purpose: str, photo: Photo, epoch: int) -> torch.Generator:
        """Return the random generator of a photo in an epoch, or of its variant in the epoch."""
        draw: object = epoch
        if self.crop_variants is not None:
            chooser = generator_for("variant", self.seed, epoch, photo.digest)
            draw = f"variant {torch.randint(self.crop_variants, (), generator=chooser).item()}"
        return generator_for(purpose, self.seed, draw, photo.digest)

    def first_crops(self, photo: Photo) -> Iterator[CropRecord]:
        """Crops of the first epochs, for the check that a mask is bright somewhere."""
        return (self.crop(photo, epoch) for epoch in range(_CHECKED_CROPS))

    def inpainting_mask(
        self, photo: Photo, crop: CropRecord, epoch: int, *, of_subject: bool = False
    ) -> Tensor:
        """Return the inpainting mask of a crop: 1 in ``(1, H, W)`` where to fill, else 0.

        Args:
            photo: The photo.
            crop: Its crop in the epoch.
            epoch: Epoch of the draw.
            of_subject: Use the bright area of the photo's mask, if it has one.
        """
        if of_subject and (mask := open_mask(photo)) is not None:
            is_bright: Tensor = apply_crop_to_mask(mask, crop) >= 0.5
            return is_bright.float()
        return random_mask(crop.target_size, self.generator("planes", photo, epoch))

    def caption(self, photo: Photo, epoch: int) -> str:
        """Draw the caption of a photo in an epoch."""
        return self.captions.draw(photo.caption, self.seed, epoch, photo.digest)


def random_mask(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a mask ``(1, H, W)``: ones in a random rectangle or ellipse, or everywhere."""
    kind, *drawn = torch.rand(5, generator=generator).tolist()
    if kind < _FULL_MASK_SHARE:
        return torch.ones(1, *size)
    # Coordinates relative to centre and half axes; axes are at least a fifth of the image.
    rows, columns = (
        (torch.arange(side) + 0.5 - centre * side) / (side * (0.2 + 0.8 * share) / 2)
        for side, centre, share in zip(size, drawn[:2], drawn[2:], strict=True)
    )
    is_ellipse = kind < (1 + _FULL_MASK_SHARE) / 2
    down, right = rows.abs()[:, None], columns.abs()[None, :]
    distance = (down.square() + right.square()).sqrt() if is_ellipse else down.maximum(right)
    inside: Tensor = distance <= 1
    return inside.float()[None]


@dataclass(frozen=True)
class Sample:
    """One training sample, with its class image if there is one.

    Attributes:
        sample_id: Digest of the photo's bytes.
        caption: Prompt of this epoch.
        crop: Crop of the pixels.
        pixels: ``(3, H, W)`` in [-1, 1], plus mask channels if the model has them; None if there
            are ``moments``.
        moments: Moments of the autoencoder's latent distribution, ``(2C, h, w)`` or more.
        mask: Loss mask ``(1, H, W)`` in [0, 1], or ``(1, h, w)`` with cached moments; None: no
            mask.
        is_prior: Whether this is a class image.
        prior: Class image that is paired with this photo.
        class_caption: Class caption for the image-free prior; None without it.
    """

    sample_id: str
    caption: str
    crop: CropRecord
    pixels: Tensor | None = None
    moments: Tensor | None = None
    mask: Tensor | None = None
    is_prior: bool = False
    prior: Sample | None = None
    class_caption: str | None = None


@dataclass(frozen=True)
class SampleBatch:
    """Stacked samples: first the photos, then their class images.

    Attributes:
        sample_ids: B digests.
        captions: B prompts.
        crops: B crop records.
        is_prior: ``(B,)`` bool.
        pixels: ``(B, 3 or more, H, W)`` or None.
        moments: ``(B, 2C or more, h, w)`` or None; exactly one of pixels and moments is set.
        mask: ``(B, 1, H, W)`` or ``(B, 1, h, w)``; None if no sample has a mask.
        partners: For each class image, the index of its photo.
        class_captions: For each photo, its class caption for the image-free prior, or None.
    """

    sample_ids: list[str]
    captions: list[str]
    crops: list[CropRecord]
    is_prior: Tensor
    pixels: Tensor | None = None
    moments: Tensor | None = None
    mask: Tensor | None = None
    partners: Sequence[int] = ()
    class_captions: Sequence[str | None] = ()

    def __len__(self) -> int:
        """Number of samples, class images included."""
        return len(self.sample_ids)

    @property
    def photos(self) -> int:
        """Number of photos."""
        return len(self) - int(self.is_prior.sum())


@dataclass(frozen=True)
class SubjectPhotos:
    """Photos of one subject, with the transform and the settings of its samples.

    Attributes:
        photos: The photos.
        draws: Draws of crops, flips and captions.
        class_images: Class images to pair with the photos (prior preservation).
        masked_loss: Use the photos' masks as loss masks.
        mask_channels: Additional channels of the pixels, for models that read them.
        class_caption: Caption -> class caption, for the image-free prior.
        repeats: Number of samples of each photo per epoch.
        more_captions: Captions that terms of the loss ask for besides.
    """

    photos: Sequence[Photo]
    draws: SampleTransform
    class_images: Sequence[Photo] = ()
    _: KW_ONLY
    masked_loss: bool = True
    mask_channels: MaskChannels | None = None
    class_caption: Callable[[str], str] | None = None
    repeats: int = 1
    more_captions: Sequence[str] = ()

    @property
    def captions(self) -> list[str]:
        """Captions of the photos before shuffling and dropout, one for each line."""
        rules = self.draws.captions
        return [caption for photo in self.photos for caption in rules.captions(photo.caption)]

    def class_image(self, index: int, epoch: int) -> Photo:
        """Class image of a photo in an epoch; over the epochs, all class images are used."""
        return self.class_images[(epoch * len(self.photos) + index) % len(self.class_images)]


class DreamBoothDataset(Dataset[Sample]):
    """Photos of one or several subjects as training samples, drawn by seed, epoch and content.

    Attributes:
        encode: Function from pixels ``(B, 3 or more, H, W)`` to moments ``(B, 2C or more, h, w)``.
            If set, samples have the autoencoder's moments instead of pixels, cached by content, and
            masks at the resolution of the moments. Only crops that are not cached are decoded, in
            the main process, which can use an accelerator.
    """

    encode: Callable[[Tensor], Tensor] | None = None

    def __init__(self, subjects: Sequence[SubjectPhotos]) -> None:
        """Concatenate the subjects' photos without opening files."""
        self.subjects = list(subjects)
        # Subject of each sample, and index among the subject's photos.
        self._rows = [(s, index) for s in self.subjects for index in range(len(s.photos))]
        self._cached: dict[tuple[object, ...], dict[str, Tensor | None]] = {}

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._rows)

    @property
    def photos(self) -> list[Photo]:
        """The photos of all subjects."""
        return [subject.photos[index] for subject, index in self._rows]

    @property
    def captions(self) -> list[str]:
        """The captions of all subjects."""
        return [caption for subject in self.subjects for caption in subject.captions]

    def tag_frequency(self) -> dict[str, int]:
        """Count the `captions` that contain each tag, most frequent first."""
        counts: Counter[str] = Counter()
        for subject in self.subjects:
            counts.update(subject.draws.captions.tag_frequency(subject.captions))
        return dict(counts.most_common())

    def contents(self) -> dict[str, list[dict[str, str]]]:
        """Return the records of all photos and class images, in order."""
        photos, class_images = list[dict[str, str]](), list[dict[str, str]]()
        for subject in self.subjects:
            identity = subject.draws.captions.identity
            photos += [p.record() | {"caption": identity(p.caption)} for p in subject.photos]
            class_images += [image.record() for image in subject.class_images]
        return {"images": photos, "class_images": class_images}

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Crop size of each photo; batches must not mix sizes."""
        return [subject.draws.target_size(subject.photos[index]) for subject, index in self._rows]

    @property
    def repeats(self) -> list[int]:
        """Number of samples of each photo per epoch."""
        return [subject.repeats for subject, _ in self._rows]

    def fill_cache(
        self, indices: Sequence[EpochIndex], on_crop: Callable[[int, int], None]
    ) -> None:
        """Encode all crops of samples in advance, so that loading does not encode.

        Args:
            indices: The samples that will be loaded.
            on_crop: Called with (encoded crops, total crops).
        """
        crops = {self._key(*cut): cut for index in indices for cut in self._crops(index)}
        for number, cut in enumerate(crops.values(), start=1):
            self._content(*cut)
            on_crop(number, len(crops))

    def all_captions(self, indices: Sequence[EpochIndex]) -> set[str]:
        """Captions that samples need: drawn ones, of the class, of class images, and of terms."""
        captions: set[str] = set()
        for sample_index in indices:
            subject, index = self._rows[sample_index.index]
            caption = subject.draws.caption(subject.photos[index], sample_index.epoch)
            captions |= {caption, *subject.more_captions}
            if subject.class_caption is not None:
                captions.add(subject.class_caption(caption))
            if subject.class_images:
                captions.add(subject.class_image(index, sample_index.epoch).caption)
        return captions

    def __getitem__(self, index: int | EpochIndex) -> Sample:
        """Return the sample at an index and its epoch; an integer means the first epoch."""
        sample_index = index if isinstance(index, EpochIndex) else EpochIndex(0, index)
        subject, _ = self._rows[sample_index.index]
        photo_cut, *class_image = self._crops(sample_index)
        photo, crop = photo_cut[:2]
        caption, prior = subject.draws.caption(photo, sample_index.epoch), None
        for cut in class_image:
            image, content = cut[0], self._content(*cut)
            prior = Sample(image.digest, image.caption, cut[1], is_prior=True, **content)
        return Sample(
            photo.digest,
            caption,
            crop,
            prior=prior,
            class_caption=subject.class_caption(caption) if subject.class_caption else None,
            **self._content(*photo_cut),
        )

    def _crops(
        self, sample_index: EpochIndex
    ) -> Iterator[tuple[Photo, CropRecord, int, SubjectPhotos]]:
        """Yield the crop of a sample's photo, and of its class image if it has one."""
        subject, number = self._rows[sample_index.index]
        photo, epoch = subject.photos[number], sample_index.epoch
        crop = subject.draws.crop(photo, epoch)
        yield photo, crop, epoch, subject
        if subject.class_images:
            image = subject.class_image(number, epoch)
            yield image, subject.draws.crop(image, epoch, crop.target_size), epoch, subject

    def _content(
        self, photo: Photo, crop: CropRecord, epoch: int, subject: SubjectPhotos
    ) -> dict[str, Any]:
        """Pixels (or cached moments) and mask of a crop."""
        # Keyed by content, never by position, so that no order of access can mix entries.
        key = self._key(photo, crop, epoch, subject)
        if key in self._cached:
            return self._cached[key]
        pixels = apply_crop(open_photo(photo.path), crop)
        if subject.mask_channels is not None:
            pixels = torch.cat([pixels, subject.mask_channels(photo, crop, epoch)])
        mask = None
        if subject.masked_loss and (image := open_mask(photo)) is not None:
            mask = apply_crop_to_mask(image, crop)
        if self.encode is None:
            return {"pixels": pixels, "mask": mask}
        moments = self.encode(pixels.unsqueeze(0))[0].detach().cpu()
        if mask is not None:
            mask = latent_mask(mask, moments.shape[-2:])
        self._cached[key] = {"moments": moments, "mask": mask}
        return self._cached[key]

    def _key(
        self, photo: Photo, crop: CropRecord, epoch: int, subject: SubjectPhotos
    ) -> tuple[object, ...]:
        """Cache key of a crop and its mask; the photo's digest identifies an alpha channel."""
        draws, channels = subject.draws, subject.mask_channels
        drawn = channels and draws.generator("planes", photo, epoch).initial_seed()
        mask = photo.mask_path is not None, photo.mask_digest, subject.masked_loss
        return photo.digest, mask, crop, channels, drawn


def collate(samples: Sequence[Sample]) -> SampleBatch:
    """Stack samples of the same crop size to a batch."""
    partners = [index for index, sample in enumerate(samples) if sample.prior is not None]
    rows = [*samples, *(sample.prior for sample in samples if sample.prior is not None)]
    masks = [row.mask for row in rows if row.mask is not None]
    everywhere = torch.ones_like(masks[0]) if masks else None
    return SampleBatch(
        sample_ids=[row.sample_id for row in rows],
        captions=[row.caption for row in rows],
        crops=[row.crop for row in rows],
        is_prior=torch.tensor([row.is_prior for row in rows]),
        pixels=_stack([row.pixels for row in rows]),
        moments=_stack([row.moments for row in rows]),
        mask=_stack([row.mask if row.mask is not None else everywhere for row in rows]),
        partners=partners,
        class_captions=[sample.class_caption for sample in samples],
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if len(present) == len(tensors) else None


def iterate_batches(
    dataset: DreamBoothDataset, sampler: EpochSampler, *, num_workers: int = 0
) -> Iterator[SampleBatch]:
    """Yield batches without end; the sampler's state counts only yielded batches.

    Save the sampler's state after training on a batch; a resumed run continues with the next one. A
    dataset with ``encode`` loads in the main process and ignores ``num_workers``.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=0 if dataset.encode else num_workers,
        # Without it, the loader draws a seed from the global generator when it starts.
        generator=torch.Generator(),
    )
    for batch in loader:
        sampler.advance()
        yield batch
