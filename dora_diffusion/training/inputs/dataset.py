"""Dataset of a run: photos of the subjects, with class images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.prior import has_class_images, is_image_free
from dora_diffusion.config.wording import counted, listing, quoted
from dora_diffusion.data.captions import (
    CaptionRules,
    contains_token,
    require_token,
)
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
    parts = code_of(config)
    made = [one.images(subjects[0], components, make) for one in parts]
    if images := list(filter(None, made)):
        dataset = DreamBoothDataset(images)
    else:
        opened = [
            _open_subject(subject, subjects, components, photos)
            for subject, photos in zip(subjects, paths, strict=True)
        ]
        captions = DreamBoothDataset([photos for photos, _ in opened]).captions
        for one in parts:
            one.check_captions(captions)
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
    config, rules = subject.settings, caption_rules(subject.settings)
    token, texts = subject.token, [photo.caption for photo in photos]
    possible = possible_captions(subject, texts)
    if token:
        require_token(possible, token)
    if is_image_free(config):
        from dora_diffusion.training.inputs.prior import check_image_free

        check_image_free(subject, possible)
    if token and config.tag_dropout:
        _check_tag_dropout(config, rules, token, texts)
    for message in filter(None, _without_effect(config, rules, photos)):
        warnings.warn(message, stacklevel=3)


def _check_tag_dropout(
    config: TrainConfig, rules: CaptionRules, token: str, texts: Sequence[str]
) -> None:
    """Warn if tag dropout may drop the token, or raise `ConfigError` with the image-free prior."""
    for text in texts:
        whole = all(contains_token(caption, token) for caption in rules.captions(text))
        left = rules.without_tags(text)
        if whole and not all(contains_token(caption, token) for caption in left):
            message = (
                f"tag_dropout may drop the token {token!r} of {quoted(text)}: raise keep_tags to "
                "keep it, or put the token into caption_prefix"
            )
            if is_image_free(config):
                raise ConfigError(message, "tag_dropout")
            warnings.warn(message, stacklevel=4)
            return


def _without_effect(
    config: TrainConfig, rules: CaptionRules, photos: Sequence[Photo]
) -> Iterator[str]:
    """Yield messages on caption settings without effect, and on captions that need a setting."""
    after = f"after the first {config.keep_tags}, which keep their places (keep_tags)"
    bare = replace(rules, prefix="")
    captions = [caption for photo in photos for caption in bare.captions(photo.caption)]
    if config.shuffle_tags and not rules.can_shuffle(captions):
        yield (
            "shuffle_tags has no effect because no caption has two or more tags, separated by "
            f"commas, {after}"
        )
    if config.tag_dropout and not rules.can_shuffle(captions, 1):
        yield f"tag_dropout has no effect because no caption has a tag {after}"
    if empty := [c for c in captions if rules.has_empty_tag(c)] if rules.draws_tags else []:
        yield (
            f"{counted(len(empty), 'caption')} with empty tags, first {quoted(empty[0])}: they are "
            "removed when tags are shuffled or dropped, and keep_tags does not count them"
        )
    lines = [photo.caption.count("\n") for photo in photos]
    if config.caption_per_line and not any(lines):
        yield "caption_per_line has no effect because no caption file has two lines"
    elif any(lines) and not config.caption_per_line:
        yield (
            f"{counted(sum(map(bool, lines)), 'caption')} of several lines, which are joined; set "
            "caption_per_line to draw one of them in every epoch"
        )


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
