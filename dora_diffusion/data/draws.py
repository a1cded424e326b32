"""Random draws of a sample: its photo's crop, its mirroring, and its caption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.crops import CropRecord, apply_crop_to_mask, plan_crop
from dora_diffusion.data.photos import Photo, open_mask
from dora_diffusion.data.sampler import generator_for

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
        ValueError: If a setting is impossible, or the resolution does not fit the model.
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
        """Check the settings."""
        if self.crop_variants is not None and self.crop_variants < 1:
            raise ValueError(f"crop_variants must be at least 1, got {self.crop_variants}")
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
            center=self.center_crop,
            generator=self.generator("crop", photo, epoch),
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
