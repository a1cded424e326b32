"""A run's photos as a dataset, with class images beside them for prior preservation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.captions import can_shuffle, contains_token, require_token
from dora_diffusion.data.checks import copies, too_few, warn_of_unused_masks
from dora_diffusion.data.crops import Buckets
from dora_diffusion.data.dataset import DreamBoothDataset
from dora_diffusion.data.draws import SampleTransform
from dora_diffusion.data.photos import Photo, read_photos
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_inputs
from dora_diffusion.models.offload import on_device
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.prior import check_image_free, class_images
from dora_diffusion.training.subject import Subject

# Crops per photo where they are drawn: the latents of all of them fit in memory.
_CROP_VARIANTS = 8


def open_dataset(
    config: TrainConfig,
    subject: Subject,
    components: Components,
    paths: Sequence[Path],
    accelerator: Any,
    on_event: OnEvent,
) -> DreamBoothDataset:
    """The photos at ``config.resolution``, with class images where the settings want them.

    Class images are generated where they are missing, so no adapter may be on the model.

    Raises:
        ConfigError, PhotoError: If photos, masks or captions cannot be trained on.
    """
    draws = SampleTransform(
        config.resolution or components.default_resolution,
        seed=config.seed,
        multiple=components.vae_factor,
        buckets=_buckets(config, components),
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        crop_variants=_CROP_VARIANTS if config.cache_latents else None,
        caption_dropout=config.caption_dropout,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
    )
    reads_masks, of_subject = components.family.planes > 0, config.inpainting_mask == "subject"
    if config.inpainting_mask and not reads_masks:
        warnings.warn(
            f"inpainting_mask has no effect because {components.name} is no inpainting model",
            stacklevel=2,
        )
    uses_masks = config.masked_loss or (reads_masks and of_subject)
    photos = read_photos(
        paths,
        config.instance_prompt or "",
        skip_unreadable=True,
        mask_crops=draws.first_crops if uses_masks else None,
    )
    captions = [photo.caption for photo in photos]
    _check(config, subject, photos, captions)
    if not uses_masks:
        warn_of_unused_masks(photos)
    prior: list[Photo] = []
    if config.with_prior_preservation and not config.is_image_free:
        prior = class_images(config, subject, components, captions, accelerator, on_event)
    planes = partial(draws.inpainting_mask, of_subject=of_subject) if reads_masks else None
    dataset = DreamBoothDataset(photos, draws, prior, masked_loss=config.masked_loss, planes=planes)
    if config.cache_latents:

        @torch.no_grad()
        def encode(pixels: Tensor) -> Tensor:
            with on_device(components.device, components.vae):
                return encode_inputs(components.vae, components.family, pixels)

        dataset.cache_moments(encode)
    return dataset


def _check(
    config: TrainConfig, subject: Subject, photos: Sequence[Photo], captions: Sequence[str]
) -> None:
    """Refuse photos and captions that teach nothing, and say what will show in the result."""
    if subject.token:
        require_token(captions, subject.token)
    for word in config.words:
        if not any(contains_token(caption, word) for caption in captions):
            raise ConfigError(
                f"the new word {word!r} is in no caption, so that nothing would train it; put it "
                "into the instance prompt or the captions",
                "new_words",
            )
    for message in filter(None, (copies(photos), too_few(photos))):
        warnings.warn(message, stacklevel=3)
    if config.shuffle_tags and not can_shuffle(captions, config.keep_tags):
        warnings.warn(
            "shuffle_tags has no effect because no caption has two or more tags, separated by "
            f"commas, after the first {config.keep_tags} that stay in place (keep_tags)",
            stacklevel=3,
        )
    if config.is_image_free:
        check_image_free(subject, captions)


def _buckets(config: TrainConfig, components: Components) -> Buckets | None:
    """Crop sizes, with sides that the UNet can halve at each of its levels."""
    if not config.aspect_ratio_buckets:
        return None
    levels = len(components.unet.config.block_out_channels) - 1
    resolution = config.resolution or components.default_resolution
    return Buckets(resolution, step=components.vae_factor * 2**levels)
