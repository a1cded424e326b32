"""The DreamBooth dataset: photos of a subject, and class images beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dora_diffusion.data.batch import Batch, Sample, collate
from dora_diffusion.data.cache import TensorCache
from dora_diffusion.data.captions import drop_caption, shuffle_tags
from dora_diffusion.data.crops import CropRecord, apply_crop, apply_crop_to_mask, plan_crop
from dora_diffusion.data.images import PhotoError, list_photos, open_photo
from dora_diffusion.data.masks import check_masks, mask_digest
from dora_diffusion.data.photos import ClassImages, Photo, open_mask, read_photos
from dora_diffusion.data.sampler import EpochIndex, EpochSampler, SamplerState, generator_for

__all__ = [
    "Augmentation",
    "Batch",
    "ClassImages",
    "DreamBoothDataset",
    "EpochIndex",
    "EpochSampler",
    "Photo",
    "Sample",
    "SamplerState",
    "collate",
    "iterate_batches",
    "read_photos",
]


# Crops in which a mask must show something.
_TRIED_CROPS = 8


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for each sample.

    Attributes:
        center_crop: Take the middle of the photo instead of drawing a place.
        random_flip: Mirror half of the samples.
        crop_variants: Draw among this many fixed crops per photo, so that a cache of latents
            fills up without losing the variety; None draws a new place every time.
        caption_dropout: Probability of the empty prompt.
        shuffle_tags: Shuffle comma-separated tags.
        keep_tags: Tags at the start that stay in place.
    """

    center_crop: bool = True
    random_flip: bool = False
    crop_variants: int | None = None
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout must be within 0 and 1, got {self.caption_dropout}")
        if self.crop_variants is not None and self.crop_variants < 1:
            raise ValueError(f"crop_variants must be at least 1, got {self.crop_variants}")
        if self.keep_tags < 0:
            raise ValueError(f"keep_tags must not be negative, got {self.keep_tags}")


class DreamBoothDataset(Dataset[Sample]):
    """Photos of a subject as training samples.

    A sample is a function of the seed, the epoch and the photo's bytes alone: the order of
    access, the number of workers and the neighbours do not matter, so a resumed run sees what an
    uninterrupted one would have.
    """

    def __init__(
        self,
        photos: str | Path | Sequence[str | Path],
        prompt: str,
        resolution: int | tuple[int, int],
        *,
        seed: int = 0,
        multiple: int = 8,
        augmentation: Augmentation | None = None,
        class_images: ClassImages | None = None,
        use_masks: bool = False,
        skip_unreadable: bool = False,
        target_sizes: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    ) -> None:
        """Verify all photos and masks at once, so that no run fails on one halfway.

        Args:
            photos: A folder, or the photos themselves.
            prompt: The instance prompt, for photos without a caption file.
            resolution: Side of the square crops, or their ``(height, width)``.
            seed: Of all draws.
            multiple: The model's pixels per latent; sides must be multiples of it.
            augmentation: What is drawn per sample.
            class_images: Pair each photo with a class image (prior preservation).
            use_masks: Read ``NAME.mask.png`` beside a photo, else its alpha channel, as the mask.
            skip_unreadable: Leave bad photos out with warnings instead of failing.
            target_sizes: Photo size to crop size, for aspect-ratio buckets; overrides
                ``resolution``.

        Raises:
            PhotoError: If photos or masks are bad, or photos are missing.
            ValueError: If the resolution does not fit the model.
        """
        if isinstance(photos, (str, Path)):
            paths = list_photos(photos)
        else:
            paths = [Path(path) for path in photos]
        self.photos, self.skipped = read_photos(
            paths, prompt, skip_unreadable=skip_unreadable, use_masks=use_masks
        )
        if not self.photos:
            raise PhotoError("no photos were given; choose at least one")
        self.resolution = resolution
        self.seed = seed
        self.multiple = multiple
        self.augmentation = augmentation or Augmentation()
        self.class_images = class_images
        self.use_masks = use_masks
        self.target_sizes = target_sizes
        self.epoch = 0
        self._encode: Callable[[Tensor], Tensor] | None = None
        self._cache: TensorCache | None = None
        for photo in self.photos:
            self.plan(photo, 0)
        if use_masks:
            check_masks(
                self.photos, lambda photo: (self.plan(photo, turn) for turn in range(_TRIED_CROPS))
            )

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.photos)

    @property
    def captions(self) -> list[str]:
        """The photos' captions before dropout and shuffling."""
        return [photo.caption for photo in self.photos]

    def contents(self) -> dict[str, list[dict[str, str]]]:
        """What is trained on, by content: name, digest, caption and mask of each image, in order.

        A checkpoint keeps it, so that a run is not resumed on other images.
        """
        photos = {"images": self.photos, "class_images": []}
        if self.class_images is not None:
            photos["class_images"] = self.class_images.photos
        return {
            kind: [
                {
                    "name": photo.path.name,
                    "image": photo.sample_id,
                    "caption": photo.caption,
                    "mask": mask_digest(photo) if self.use_masks and kind == "images" else "",
                }
                for photo in rows
            ]
            for kind, rows in photos.items()
        }

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Per photo the crop size, which must be equal within a batch."""
        return [self.target_size(photo) for photo in self.photos]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of plain integer indices."""
        self.epoch = epoch

    def cache_moments(self, encode: Callable[[Tensor], Tensor], cache: TensorCache) -> None:
        """Yield the autoencoder's moments instead of pixels, cached by content.

        A photo is decoded only where its crop is not in the cache. Load in the main process
        (``num_workers=0``), where ``encode`` can use an accelerator.

        Args:
            encode: Pixels ``(B, 3, H, W)`` to moments ``(B, 2C, h, w)``.
            cache: Its identity must be the autoencoder's.
        """
        self._encode, self._cache = encode, cache

    @property
    def caches_moments(self) -> bool:
        """Whether samples carry moments instead of pixels."""
        return self._cache is not None

    def target_size(self, photo: Photo) -> tuple[int, int]:
        """The crop size ``(height, width)`` of a photo."""
        if self.target_sizes is not None:
            return self.target_sizes(photo.size)
        side = self.resolution
        return (side, side) if isinstance(side, int) else side

    def plan(
        self, photo: Photo, epoch: int, target_size: tuple[int, int] | None = None
    ) -> CropRecord:
        """The crop of a photo in an epoch; place and flip are drawn apart, each from its own."""
        draw = self.augmentation
        turn: object = epoch
        if draw.crop_variants is not None:
            chooser = generator_for("variant", self.seed, epoch, photo.sample_id)
            turn = f"variant {torch.randint(draw.crop_variants, (), generator=chooser).item()}"
        crop = plan_crop(
            photo.size,
            target_size or self.target_size(photo),
            center=draw.center_crop,
            generator=generator_for("crop", self.seed, turn, photo.sample_id),
            multiple=self.multiple,
        )
        coin = generator_for("flip", self.seed, epoch, photo.sample_id)
        flipped = draw.random_flip and torch.rand((), generator=coin).item() < 0.5
        return replace(crop, flipped=flipped)

    def caption(self, photo: Photo, epoch: int) -> str:
        """The caption of a photo in an epoch, after shuffling and dropout."""
        draw = self.augmentation
        generator = generator_for("caption", self.seed, epoch, photo.sample_id)
        text = photo.caption
        if draw.shuffle_tags:
            text = shuffle_tags(text, generator, keep=draw.keep_tags)
        if draw.caption_dropout > 0.0:
            text = drop_caption(text, draw.caption_dropout, generator)
        return text

    def __getitem__(self, index: int | EpochIndex) -> Sample:
        """The sample at an index, in the index's epoch or the one that was set."""
        epoch, position = self._position(index)
        photo = self.photos[position]
        crop = self.plan(photo, epoch)
        prior = None
        if self.class_images is not None:
            # Walk through all class images, however few the photos are.
            turn = (epoch * len(self.photos) + position) % len(self.class_images)
            prior = self._prior(self.class_images[turn], epoch, crop.target_size)
        content = self._content(photo, crop)
        mask = self._mask(photo, crop) if self.use_masks else None
        caption = self.caption(photo, epoch)
        return Sample(photo.sample_id, caption, crop, mask=mask, prior=prior, **content)

    def _position(self, index: int | EpochIndex) -> tuple[int, int]:
        """Epoch and photo number of an index."""
        if isinstance(index, EpochIndex):
            return index.epoch, index.index
        return self.epoch, index

    def _prior(self, photo: Photo, epoch: int, target_size: tuple[int, int]) -> Sample:
        """A class image, cut to its partner's size."""
        crop = self.plan(photo, epoch, target_size)
        content = self._content(photo, crop)
        return Sample(photo.sample_id, photo.caption, crop, is_prior=True, **content)

    def _content(self, photo: Photo, crop: CropRecord) -> dict[str, Any]:
        """The pixels of a crop, or its moments where a cache is set."""
        if self._cache is None or self._encode is None:
            return {"pixels": apply_crop(open_photo(photo.path), crop)}
        encode = self._encode

        def compute() -> dict[str, Tensor]:
            return {"moments": encode(apply_crop(open_photo(photo.path), crop).unsqueeze(0))[0]}

        key = self._cache.key(photo.sample_id, crop.key)
        return {"moments": self._cache.get_or_compute(key, compute)["moments"]}

    def _mask(self, photo: Photo, crop: CropRecord) -> Tensor | None:
        """The crop of a photo's mask, where it has one."""
        mask = open_mask(photo)
        return None if mask is None else apply_crop_to_mask(mask, crop)


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
