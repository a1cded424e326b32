"""Dataset of a run: photos of the subjects, with class images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.prior import has_class_images, is_image_free
from dora_diffusion.config.wording import counted, listing
from dora_diffusion.data.captions import contains_token, require_token
from dora_diffusion.data.checks import copies, too_few, warn_of_unused_masks
from dora_diffusion.data.crops import Buckets
from dora_diffusion.data.dataset import DreamBoothDataset, SampleTransform, SubjectPhotos
from dora_diffusion.data.images import PhotoError, digest_of, read_bytes
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_inputs
from dora_diffusion.models.offload import on_device
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.features.code import code_of
from dora_diffusion.training.inputs.subject import (
    Subject,
    caption_rules,
    class_caption_of,
    possible_captions,
)

# Number of different random crops per photo when latents are cached, so that all fit in memory.
_CROP_VARIANTS = 8


def list_subjects(subjects: Sequence[Subject]) -> list[list[Path]]:
    """List the photos of each subject, sorted by file name, without decoding.

    Raises:
        PhotoError: If a folder is missing or has no photo, or if two subjects share a photo.
    """
    configs = (subject.settings for subject in subjects)
    # The folders of several subjects are in a dataset file, where no flag sets them.
    setting = "instance_data_dir" if len(subjects) == 1 else ""
    paths = [
        []
        if not config.has_photos
        else list_photos(config.instance_data_dir or "", setting=setting)
        for config in configs
    ]
    owners: dict[str, tuple[Subject, Path]] = {}
    for subject, photos in zip(subjects, paths, strict=True) if len(subjects) > 1 else ():
        for path in photos:
            owner, other = owners.setdefault(digest_of(read_bytes(path)), (subject, path))
            if owner.trigger.lower() != subject.trigger.lower():
                raise PhotoError(
                    f"{path} is the same photo as {other}, but they belong to {subject.trigger!r} "
                    f"and {owner.trigger!r}; remove it from one of the subjects"
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
    """Open the photos of all subjects, with class images if configured, or make other images.

    Missing class images are generated. The model must therefore have no adapters.

    Args:
        config: Settings of the run.
        subjects: The subjects.
        components: The model, without adapters.
        paths: Photos of each subject.
        accelerator: See `class_images`.
        on_event: See `class_images`.

    Raises:
        ConfigError, PhotoError: If photos, masks or captions cannot be trained on.
    """
    make = partial(_class_images, accelerator=accelerator, on_event=on_event)
    made = [one.images(subjects[0], components, make) for one in code_of(config)]
    if images := list(filter(None, made)):
        dataset = DreamBoothDataset(images)
    else:
        opened = [
            _open_subject(subject, subjects, components, photos)
            for subject, photos in zip(subjects, paths, strict=True)
        ]
        captions = DreamBoothDataset([photos for photos, _ in opened]).captions
        for word in config.describe().words:
            if not any(contains_token(caption, word) for caption in captions):
                raise ConfigError(
                    f"the new word {word!r} is in no caption and would not be trained; add it to "
                    "the instance prompt or the captions",
                    "new_words",
                )
        # Generating class images may take an hour, so that it comes after all checks.
        dataset = DreamBoothDataset([
            replace(photos, class_images=make(subject, components, prompts)) if prompts else photos
            for subject, (photos, prompts) in zip(subjects, opened, strict=True)
        ])  # fmt: skip
    if config.cache_latents:

        @torch.no_grad()
        def encode(pixels: Tensor) -> Tensor:
            with on_device(components.device, components.vae):
                return encode_inputs(components.vae, components.family, pixels)

        dataset.encode = encode
    return dataset


def _class_images(*args: Any, **options: Any) -> list[Photo]:
    """Call `class_images`, importing the sampling code only when it is needed."""
    from dora_diffusion.training.inputs.prior import class_images

    return class_images(*args, **options)


def _open_subject(
    subject: Subject,
    subjects: Sequence[Subject],
    components: Components,
    paths: Sequence[Path],
) -> tuple[SubjectPhotos, list[str]]:
    """Open the photos of a subject. Returns them with the prompts of its class images."""
    config = subject.settings
    draws = _sample_transform(config, components)
    reads_masks = components.family.mask_channels > 0
    of_subject = config.inpainting_mask == "subject"
    mask = partial(draws.inpainting_mask, of_subject=of_subject)
    if config.inpainting_mask and not reads_masks:
        warnings.warn(
            f"inpainting_mask has no effect because {components.name} is not an inpainting model",
            stacklevel=2,
        )
    uses_masks = config.masked_loss or (reads_masks and of_subject)
    photos = read_photos(
        paths,
        config.instance_prompt or "",
        skip_unreadable=True,
        mask_crops=draws.first_crops if uses_masks else None,
        per_line=True,
    )
    check_subject(subject, photos)
    if not uses_masks:
        warn_of_unused_masks(photos)
    as_class = partial(class_caption_of, subjects, subject)
    prompts: list[str] = []
    if has_class_images(config):
        captions = [c for photo in photos for c in draws.captions.captions(photo.caption)]
        from dora_diffusion.training.inputs.prior import class_prompts

        prompts = class_prompts(subject, captions, as_class)
    opened = SubjectPhotos(
        photos,
        draws,
        masked_loss=config.masked_loss,
        mask_channels=mask if reads_masks else None,
        class_caption=as_class if is_image_free(config) else None,
        repeats=config.repeats,
    )
    return opened, prompts


def _sample_transform(config: TrainConfig, components: Components) -> SampleTransform:
    return SampleTransform(
        config.resolution or components.default_resolution,
        seed=config.seed,
        multiple=components.size_step,
        buckets=_buckets(config, components),
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        crop_variants=_CROP_VARIANTS if config.cache_latents else None,
        captions=caption_rules(config),
    )


def check_subject(subject: Subject, photos: Sequence[Photo]) -> None:
    """Check the photos and captions of a subject.

    Raises:
        ConfigError, ValueError: If captions are missing, or lack a token that they need.

    Warns:
        UserWarning: If photos are too few or too similar, or captions do not fit the settings.
    """
    bare = [photo.path.name for photo in photos if not photo.caption]
    if bare:
        raise ConfigError(
            f"{counted(len(bare), 'photo')} without a caption ({listing(bare, 3)}); write a .txt "
            "file next to each, or set instance_prompt for all",
            "instance_prompt",
        )
    for message in filter(None, (copies(photos), too_few(photos))):
        warnings.warn(message, stacklevel=3)
    check_captions(subject, photos)


def check_captions(subject: Subject, photos: Sequence[Photo]) -> None:
    """Check all captions that may be drawn for a subject, as `check_subject` does."""
    rules, texts = caption_rules(subject.settings), [photo.caption for photo in photos]
    possible, needs_all = possible_captions(subject, texts), is_image_free(subject.settings)
    if subject.token:
        require_token(possible, subject.token)
    if needs_all:
        from dora_diffusion.training.inputs.prior import check_image_free

        check_image_free(subject, possible)
    rules.check_token_kept(subject.token, texts, strictly=needs_all)
    for message in rules.without_effect(texts):
        warnings.warn(message, stacklevel=3)


def _buckets(config: TrainConfig, components: Components) -> Buckets | None:
    """Return the crop sizes."""
    if not config.aspect_ratio_buckets:
        return None
    step = components.bucket_step
    if config.bucket_reso_steps and config.bucket_reso_steps % step:
        raise ConfigError(
            f"bucket_reso_steps is {config.bucket_reso_steps}; {components.name} needs a multiple "
            f"of {step}",
            "bucket_reso_steps",
        )
    return Buckets(
        config.resolution or components.default_resolution,
        config.bucket_reso_steps or step,
        config.min_bucket_reso,
        config.max_bucket_reso,
    )
