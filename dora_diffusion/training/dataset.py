"""The photos of a run's subjects as a dataset, with class images beside them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.captions import can_shuffle, require_token
from dora_diffusion.data.checks import copies, too_few, warn_of_unused_masks
from dora_diffusion.data.crops import Buckets
from dora_diffusion.data.dataset import DreamBoothDataset, SubjectPhotos
from dora_diffusion.data.draws import SampleTransform
from dora_diffusion.data.images import PhotoError, digest_of, read_bytes
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_inputs
from dora_diffusion.models.offload import on_device
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.prior import check_image_free, class_images, class_prompts
from dora_diffusion.training.subject import Subject, class_caption_of
from dora_diffusion.wording import counted, listing

# Crops per photo where they are drawn: the latents of all of them fit in memory.
_CROP_VARIANTS = 8


def list_subjects(subjects: Sequence[Subject]) -> list[list[Path]]:
    """The photos of each subject, by file name; nothing is decoded.

    Raises:
        PhotoError: If a folder is missing or holds no photo, or a photo is of two subjects.
    """
    paths = [list_photos(subject.settings.instance_data_dir or "") for subject in subjects]
    owners: dict[str, tuple[Subject, Path]] = {}
    for subject, photos in zip(subjects, paths, strict=True) if len(subjects) > 1 else ():
        for path in photos:
            owner, other = owners.setdefault(digest_of(read_bytes(path)), (subject, path))
            if owner.trigger.lower() != subject.trigger.lower():
                raise PhotoError(
                    f"{path} is the same photo as {other}, and would be {owner.trigger!r} and "
                    f"{subject.trigger!r}; leave it to one of them"
                )
    return paths


def open_dataset(
    config: TrainConfig,
    subjects: Sequence[Subject],
    components: Components,
    paths: Sequence[Sequence[Path]],
    accelerator: Any,
    on_event: OnEvent,
) -> DreamBoothDataset:
    """The photos of all subjects, with class images where the settings want them.

    Class images are generated where they are missing, so no adapter may be on the model.

    Args:
        config: The run's settings.
        subjects: What is taught.
        components: The model, without adapters.
        paths: The photos of each subject.
        accelerator: See `class_images`.
        on_event: See `class_images`.

    Raises:
        ConfigError, PhotoError: If photos, masks or captions cannot be trained on.
    """
    dataset = DreamBoothDataset([
        _open_subject(subject, subjects, components, photos, accelerator, on_event)
        for subject, photos in zip(subjects, paths, strict=True)
    ])  # fmt: skip
    if config.cache_latents:

        @torch.no_grad()
        def encode(pixels: Tensor) -> Tensor:
            with on_device(components.device, components.vae):
                return encode_inputs(components.vae, components.family, pixels)

        dataset.cache_moments(encode)
    return dataset


def _open_subject(
    subject: Subject,
    subjects: Sequence[Subject],
    components: Components,
    paths: Sequence[Path],
    accelerator: Any,
    on_event: OnEvent,
) -> SubjectPhotos:
    """One subject's photos at its resolution."""
    config = subject.settings
    draws = _sample_transform(config, components)
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
    check_subject(subject, photos)
    if not uses_masks:
        warn_of_unused_masks(photos)
    as_class = partial(class_caption_of, subjects, subject)
    prior: list[Photo] = []
    if config.uses_class_images:
        prompts = class_prompts(subject, captions, as_class)
        prior = class_images(subject, components, prompts, accelerator, on_event)
    return SubjectPhotos(
        photos,
        draws,
        prior,
        masked_loss=config.masked_loss,
        planes=partial(draws.inpainting_mask, of_subject=of_subject) if reads_masks else None,
        class_caption=as_class if config.is_image_free else None,
        repeats=config.repeats,
        weight=config.weight,
    )


def _sample_transform(config: TrainConfig, components: Components) -> SampleTransform:
    return SampleTransform(
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


def check_subject(subject: Subject, photos: Sequence[Photo]) -> None:
    """Refuse photos and captions that teach nothing, and say what will show in the result.

    Raises:
        ConfigError, ValueError: If captions are missing, or lack the token where it is needed.
    """
    config, captions = subject.settings, [photo.caption for photo in photos]
    bare = [photo.path.name for photo in photos if not photo.caption]
    if bare:
        raise ConfigError(
            f"{counted(len(bare), 'photo')} without a caption ({listing(bare, 3)}); write one into "
            "a .txt beside each, or one for all with instance_prompt"
        )
    if subject.token:
        require_token(captions, subject.token)
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
