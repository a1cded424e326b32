"""The DreamBooth dataset: photos of one or several subjects and their draws, with class images."""

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
"""A photo, its crop and the epoch -> further channels ``(k, H, W)`` of the crop's pixels."""

# Of random masks, as Stable Diffusion 1.5 Inpainting was trained.
_WHOLE = 0.25
# Crops in which a mask must show something.
_TRIED_CROPS = 8


@dataclass(frozen=True)
class SampleTransform:
    """Crops and captions, each a function of the seed, the epoch and the photo's digest alone.

    The order of access, the number of workers and the neighbours do not matter, so a resumed run
    sees what an uninterrupted one would have.

    Attributes:
        resolution: Side of the square crops.
        seed: Random seed of all draws.
        multiple: The model's pixels per latent; sides must be multiples of it.
        buckets: Photo size to crop size, for aspect-ratio buckets; overrides ``resolution``.
        center_crop: Take the middle of the photo instead of drawing a place.
        random_flip: Mirror half of the samples.
        crop_variants: Draw among this many fixed crops per photo, so that a cache of latents
            fills up without losing the variety; None draws a new place every time.
        captions: How captions are drawn.

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
        """Check the resolution."""
        plan_crop((self.resolution, self.resolution), self.resolution, multiple=self.multiple)

    def target_size(self, photo: Photo) -> tuple[int, int]:
        """The crop size ``(height, width)`` of a photo."""
        return self.buckets(photo.size) if self.buckets else (self.resolution, self.resolution)

    def crop(
        self, photo: Photo, epoch: int, target_size: tuple[int, int] | None = None
    ) -> CropRecord:
        """The crop of a photo in an epoch; place and flip are drawn apart, each from its own."""
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
        """Return the random generator of a photo in an epoch, or of one of its variants."""
        turn: object = epoch
        if self.crop_variants is not None:
            chooser = generator_for("variant", self.seed, epoch, photo.digest)
            turn = f"variant {torch.randint(self.crop_variants, (), generator=chooser).item()}"
        return generator_for(purpose, self.seed, turn, photo.digest)

    def first_crops(self, photo: Photo) -> Iterator[CropRecord]:
        """Crops of the first epochs, in which a mask must show something."""
        return (self.crop(photo, epoch) for epoch in range(_TRIED_CROPS))

    def inpainting_mask(
        self, photo: Photo, crop: CropRecord, epoch: int, *, of_subject: bool = False
    ) -> Tensor:
        """Return the inpainting mask of a crop: 1 in ``(1, H, W)`` where to fill, else 0.

        Args:
            photo: The photo.
            crop: Its crop in the epoch.
            epoch: Of the draw.
            of_subject: Fill where the photo's mask is bright, if it has one.
        """
        if of_subject and (mask := open_mask(photo)) is not None:
            is_bright: Tensor = apply_crop_to_mask(mask, crop) >= 0.5
            return is_bright.float()
        return random_mask(crop.target_size, self.generator("planes", photo, epoch))

    def caption(self, photo: Photo, epoch: int) -> str:
        """The caption of a photo in an epoch."""
        return self.captions.draw(photo.caption, self.seed, epoch, photo.digest)


def random_mask(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A rectangle or an ellipse of ones anywhere in ``(1, H, W)`` zeros, or ones everywhere."""
    kind, *drawn = torch.rand(5, generator=generator).tolist()
    if kind < _WHOLE:
        return torch.ones(1, *size)
    # Distances from its centre, as shares of its half axes: a fifth of the image at least.
    rows, columns = (
        (torch.arange(side) + 0.5 - centre * side) / (side * (0.2 + 0.8 * share) / 2)
        for side, centre, share in zip(size, drawn[:2], drawn[2:], strict=True)
    )
    is_ellipse = kind < (1 + _WHOLE) / 2
    down, right = rows.abs()[:, None], columns.abs()[None, :]
    distance = (down.square() + right.square()).sqrt() if is_ellipse else down.maximum(right)
    inside: Tensor = distance <= 1
    return inside.float()[None]


@dataclass(frozen=True)
class Sample:
    """One training sample, with its class image where prior preservation is on.

    Attributes:
        sample_id: Digest of the photo's bytes.
        caption: The prompt of this epoch.
        crop: How the pixels were cut.
        pixels: ``(3, H, W)`` in [-1, 1], and the mask where the model reads one; None where
            ``moments`` stand in for them.
        moments: What the autoencoder makes of the pixels, ``(2C, h, w)`` or more.
        mask: ``(1, H, W)`` in [0, 1], where to learn; ``(1, h, w)`` beside moments that are cached.
            None means everywhere.
        is_prior: Whether this is a class image.
        prior: The class image that goes with this photo.
        class_caption: The caption without its subject, whose prediction the image-free prior holds;
            None where this is not held.
        weight: Factor of its loss.
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
    weight: float = 1.0


@dataclass(frozen=True)
class SampleBatch:
    """Samples stacked: the photos first, then the class images of those that have one.

    Attributes:
        sample_ids: B digests.
        captions: B prompts.
        crops: B crop records.
        is_prior: ``(B,)`` bool.
        pixels: ``(B, 3 or more, H, W)`` or None.
        moments: ``(B, 2C or more, h, w)`` or None; of pixels and moments exactly one is there.
        mask: ``(B, 1, H, W)`` or ``(B, 1, h, w)``, or None where no sample has one.
        partners: Of each class image the place of its photo.
        class_captions: Of each photo its class caption for the image-free prior, or None.
        weights: ``(photos,)``, the factor of each photo's loss; None where all are 1.
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
    weights: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples, class images included."""
        return len(self.sample_ids)

    @property
    def photos(self) -> int:
        """Number of photos."""
        return len(self) - int(self.is_prior.sum())


@dataclass(frozen=True)
class SubjectPhotos:
    """The photos of one subject, and how they become samples.

    Attributes:
        photos: The photos.
        draws: How they are cut, mirrored and captioned.
        class_images: Pair each photo with one of these (prior preservation).
        masked_loss: The photos' masks say where to learn.
        mask_channels: Further channels of the pixels, for models that read them.
        class_caption: A caption to its class caption, where the image-free prior holds that.
        repeats: How often an epoch has each photo.
        weight: Factor of each photo's loss.
    """

    photos: Sequence[Photo]
    draws: SampleTransform
    class_images: Sequence[Photo] = ()
    _: KW_ONLY
    masked_loss: bool = True
    mask_channels: MaskChannels | None = None
    class_caption: Callable[[str], str] | None = None
    repeats: int = 1
    weight: float = 1.0

    @property
    def captions(self) -> list[str]:
        """The photos' captions before dropout and shuffling, with each line and alternative."""
        rules = self.draws.captions
        return [caption for photo in self.photos for caption in rules.variants(photo.caption)]

    def class_image(self, index: int, epoch: int) -> Photo:
        """The class image that goes with a photo: all have their turn, however few photos are."""
        return self.class_images[(epoch * len(self.photos) + index) % len(self.class_images)]


class DreamBoothDataset(Dataset[Sample]):
    """Photos of one or several subjects as training samples, drawn by seed, epoch and content.

    Attributes:
        encode: Pixels ``(B, 3 or more, H, W)`` to moments ``(B, 2C or more, h, w)``. Samples then
            have the autoencoder's moments instead of pixels, each kept in memory by its content,
            and a mask beside them at their size. Photo and mask are decoded only where the crop is
            not in the cache, in the main process, where an accelerator can be used.
    """

    encode: Callable[[Tensor], Tensor] | None = None

    def __init__(self, subjects: Sequence[SubjectPhotos]) -> None:
        """Concatenate the subjects' photos; no file is opened."""
        self.subjects = list(subjects)
        # Each sample's subject, and its place among the photos of that.
        self._rows = [(s, place) for s in self.subjects for place in range(len(s.photos))]
        self._cached: dict[tuple[object, ...], dict[str, Tensor | None]] = {}

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._rows)

    @property
    def photos(self) -> list[Photo]:
        """The photos of all subjects."""
        return [subject.photos[place] for subject, place in self._rows]

    @property
    def captions(self) -> list[str]:
        """The captions of all subjects."""
        return [caption for subject in self.subjects for caption in subject.captions]

    def tag_frequency(self) -> dict[str, int]:
        """Count the `captions` that hold each tag, most frequent first."""
        counts: Counter[str] = Counter()
        for subject in self.subjects:
            counts.update(subject.draws.captions.tag_frequency(subject.captions))
        return dict(counts.most_common())

    def contents(self) -> dict[str, list[dict[str, str]]]:
        """Return the training data, in order: the record of each photo and class image."""
        photos, class_images = list[dict[str, str]](), list[dict[str, str]]()
        for subject in self.subjects:
            own = subject.draws.captions.identity
            photos += [photo.record() | {"caption": own(photo.caption)} for photo in subject.photos]
            class_images += [image.record() for image in subject.class_images]
        return {"images": photos, "class_images": class_images}

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Crop size of each photo, which must be equal within a batch."""
        return [subject.draws.target_size(subject.photos[place]) for subject, place in self._rows]

    @property
    def repeats(self) -> list[int]:
        """Number of times that an epoch has each photo."""
        return [subject.repeats for subject, _ in self._rows]

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
        """The captions of these samples, as they are drawn, and those of their priors."""
        captions: set[str] = set()
        for at in indices:
            subject, place = self._rows[at.index]
            captions.add(caption := subject.draws.caption(subject.photos[place], at.epoch))
            if subject.class_caption is not None:
                captions.add(subject.class_caption(caption))
            if subject.class_images:
                captions.add(subject.class_image(place, at.epoch).caption)
        return captions

    def __getitem__(self, index: int | EpochIndex) -> Sample:
        """The sample at an index, in the index's epoch; a plain number is of the first one."""
        at = index if isinstance(index, EpochIndex) else EpochIndex(0, index)
        subject, _ = self._rows[at.index]
        own, *class_image = self._crops(at)
        photo, crop = own[:2]
        caption, prior = subject.draws.caption(photo, at.epoch), None
        for cut in class_image:
            image, content = cut[0], self._content(*cut)
            prior = Sample(image.digest, image.caption, cut[1], is_prior=True, **content)
        return Sample(
            photo.digest,
            caption,
            crop,
            prior=prior,
            class_caption=subject.class_caption(caption) if subject.class_caption else None,
            weight=subject.weight * photo.weight,
            **self._content(*own),
        )

    def _crops(self, at: EpochIndex) -> Iterator[tuple[Photo, CropRecord, int, SubjectPhotos]]:
        """Yield the crops of a sample: of the photo, and of the class image beside it."""
        subject, place = self._rows[at.index]
        photo = subject.photos[place]
        crop = subject.draws.crop(photo, at.epoch)
        yield photo, crop, at.epoch, subject
        if subject.class_images:
            image = subject.class_image(place, at.epoch)
            yield image, subject.draws.crop(image, at.epoch, crop.target_size), at.epoch, subject

    def _content(
        self, photo: Photo, crop: CropRecord, epoch: int, subject: SubjectPhotos
    ) -> dict[str, Any]:
        """The pixels and the mask of a crop, or what is cached of both."""
        # By content and never by position, so that no order of access can mix entries.
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
        """Return the cache key of a crop and its mask; an alpha channel has the photo's digest."""
        draws, channels = subject.draws, subject.mask_channels
        drawn = channels and draws.generator("planes", photo, epoch).initial_seed()
        mask = photo.mask_path is not None, photo.mask_digest, subject.masked_loss
        return photo.digest, mask, crop, channels, drawn


def collate(samples: Sequence[Sample]) -> SampleBatch:
    """Stack samples of one crop size to a batch."""
    partners = [place for place, sample in enumerate(samples) if sample.prior is not None]
    rows = [*samples, *(sample.prior for sample in samples if sample.prior is not None)]
    weights = [sample.weight for sample in samples]
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
        weights=None if set(weights) == {1.0} else torch.tensor(weights),
    )


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if len(present) == len(tensors) else None


def iterate_batches(
    dataset: DreamBoothDataset, sampler: EpochSampler, *, num_workers: int = 0
) -> Iterator[SampleBatch]:
    """Load batches forever, keeping the sampler's state at what has been handed out.

    Save the sampler's state after training on a batch; resuming continues with the next.
    A dataset that encodes images does so in the main process, whatever workers are asked for.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=0 if dataset.encode else num_workers,
        # Its own: a loader otherwise draws from the global one when it starts.
        generator=torch.Generator(),
    )
    for batch in loader:
        sampler.advance()
        yield batch
