"""The photos of a run's subjects as a dataset, with class images beside them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.wording import counted, listing, quoted
from dora_diffusion.data.captions import (
    WILD,
    CaptionRules,
    contains_token,
    read_caption,
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
from dora_diffusion.models.text import encode_prompts, token_limit
from dora_diffusion.training.events import OnEvent
from dora_diffusion.training.inputs.subject import (
    Subject,
    caption_rules,
    class_caption_of,
    possible_captions,
)

# Crops per photo where they are drawn: the latents of all of them fit in memory.
_CROP_VARIANTS = 8


def list_subjects(subjects: Sequence[Subject]) -> list[list[Path]]:
    """The photos of each subject, by file name; nothing is decoded. A slider has none.

    Raises:
        PhotoError: If a folder is missing or holds no photo, or a photo is of two subjects.
    """
    given = (subject.settings for subject in subjects)
    # Folders of several subjects are in a list, which no flag replaces.
    setting = "instance_data_dir" if len(subjects) == 1 else ""
    paths = [
        [] if own.is_slider else list_photos(own.instance_data_dir or "", setting=setting)
        for own in given
    ]
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
    """The photos of all subjects, with class images where the settings want them; or a slider's.

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
    make = partial(_class_images, accelerator=accelerator, on_event=on_event)
    if config.is_slider:
        dataset = DreamBoothDataset([_open_slider(subjects[0], components, make)])
    else:
        opened = [
            _open_subject(subject, subjects, components, photos)
            for subject, photos in zip(subjects, paths, strict=True)
        ]
        _check_words(config, DreamBoothDataset([photos for photos, _ in opened]).captions)
        # Making class images may take an hour: after all that can be refused.
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
    """Generate class images that are missing (`class_images`)."""
    from dora_diffusion.training.inputs.prior import class_images

    return class_images(*args, **options)


def _open_slider(
    subject: Subject, components: Components, make: Callable[..., list[Photo]]
) -> SubjectPhotos:
    """Images of a slider's prompts, each captioned with its target; beside them its anchors'.

    Those of the ends are what denoising at a strength passes through.
    """
    config = replace(subject.settings, class_data_dir=None, class_prompt=None)
    _check_ends(components, config)
    targets = {target: target for target in config.target}
    for target, ends in config.slider_pairs:
        targets = dict.fromkeys(ends, target) | targets
    images = make(replace(subject, settings=config), components, [*targets, *config.anchors])
    return SubjectPhotos(
        [
            replace(image, caption=targets.get(image.caption, config.target[0]))
            for image in images
            if image.caption not in config.anchors
        ],
        SampleTransform(
            config.resolution or components.default_resolution,
            seed=config.seed,
            multiple=components.vae_factor,
        ),
        [image for image in images if image.caption in config.anchors],
    )


@torch.no_grad()
def _check_ends(components: Components, config: TrainConfig) -> None:
    """Refuse prompts that the model reads alike, such as those that differ beyond its limit."""
    with on_device(components.device, *components.text_encoders):
        for _, ends in config.slider_pairs:
            states = encode_prompts(components, ends).encoder_hidden_states
            if torch.allclose(*states):
                raise ConfigError(
                    f"{components.name} reads {quoted(ends[0])} and {quoted(ends[1])} as the same "
                    f"words, of which it reads {token_limit(components)}; give prompts that differ "
                    "earlier",
                    "negative",
                )


def _check_words(config: TrainConfig, captions: Sequence[str]) -> None:
    for word in config.words:
        if not any(contains_token(caption, word) for caption in captions):
            raise ConfigError(
                f"the new word {word!r} is in no caption, so that nothing would train it; put it "
                "into the instance prompt or the captions",
                "new_words",
            )


def _open_subject(
    subject: Subject,
    subjects: Sequence[Subject],
    components: Components,
    paths: Sequence[Path],
) -> tuple[SubjectPhotos, list[str]]:
    """One subject's photos at its resolution, and the prompts of the class images that it needs."""
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
    if config.uses_class_images:
        captions = [c for photo in photos for c in draws.captions.variants(photo.caption)]
        from dora_diffusion.training.inputs.prior import class_prompts

        prompts = class_prompts(subject, captions, as_class)
    opened = SubjectPhotos(
        photos,
        draws,
        masked_loss=config.masked_loss,
        mask_channels=mask if reads_masks else None,
        class_caption=as_class if config.is_image_free else None,
        repeats=config.repeats,
        weight=config.weight,
    )
    return opened, prompts


def _sample_transform(config: TrainConfig, components: Components) -> SampleTransform:
    return SampleTransform(
        config.resolution or components.default_resolution,
        seed=config.seed,
        multiple=components.vae_factor,
        buckets=_buckets(config, components),
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        crop_variants=_CROP_VARIANTS if config.cache_latents else None,
        captions=caption_rules(config),
    )


def check_wildcards(config: TrainConfig, paths: Sequence[Path]) -> None:
    """Refuse captions and a class prompt whose wildcards cannot be drawn, before a model is loaded.

    Raises:
        PhotoError: Naming the photo; captions that cannot be read are not looked at.
        ConfigError: Of the class prompt.
    """
    rules = caption_rules(config)
    rules.plain(config.class_prompt or "")
    for path in paths if config.wildcards else ():
        text = ""
        with contextlib.suppress(OSError, ValueError):
            text = read_caption(path, "", per_line=True)
        try:
            rules.possible(text, "")
        except ValueError as error:
            raise PhotoError(f"the caption of {path.name}: {error}") from error


def check_subject(subject: Subject, photos: Sequence[Photo]) -> None:
    """Refuse photos and captions that teach nothing, and say what will show in the result.

    Raises:
        ConfigError, ValueError: If captions are missing, or lack the token where it is needed.
    """
    bare = [photo.path.name for photo in photos if not photo.caption]
    if bare:
        raise ConfigError(
            f"{counted(len(bare), 'photo')} without a caption ({listing(bare, 3)}); write one into "
            "a .txt beside each, or one for all with instance_prompt",
            "instance_prompt",
        )
    for message in filter(None, (copies(photos), too_few(photos))):
        warnings.warn(message, stacklevel=3)
    check_captions(subject, photos)


def check_captions(subject: Subject, photos: Sequence[Photo]) -> None:
    """The same of captions alone; what counts is every caption that may be drawn of them."""
    config, rules = subject.settings, caption_rules(subject.settings)
    token, texts = subject.token, [photo.caption for photo in photos]
    possible = possible_captions(subject, texts)
    if token:
        require_token(possible, token)
    if config.is_image_free:
        from dora_diffusion.training.inputs.prior import check_image_free

        check_image_free(subject, possible)
    if token and config.tag_dropout:
        _check_tag_dropout(config, rules, token, texts)
    for message in filter(None, _without_effect(config, rules, photos)):
        warnings.warn(message, stacklevel=3)


def _check_tag_dropout(
    config: TrainConfig, rules: CaptionRules, token: str, texts: Sequence[str]
) -> None:
    """Warn that tag dropout may leave out the token; the image-free prior needs it."""
    for text in texts:
        whole = all(contains_token(caption, token) for caption in rules.possible(text, token))
        left = rules.possible(text, token, with_dropout=True)
        if whole and not all(contains_token(caption, token) for caption in left):
            message = (
                f"tag_dropout may leave out the token {token!r} of {quoted(text)}: raise keep_tags "
                "so that it stays, or put the token into caption_prefix"
            )
            if config.is_image_free:
                raise ConfigError(message, "tag_dropout")
            warnings.warn(message, stacklevel=4)
            return


def _without_effect(
    config: TrainConfig, rules: CaptionRules, photos: Sequence[Photo]
) -> Iterator[str]:
    """Caption settings that these captions leave without effect, and captions that lack one."""
    kept = f"after the first {config.keep_tags} that stay in place (keep_tags)"
    own = replace(rules, prefix="", suffix="")
    captions = [caption for photo in photos for caption in own.variants(photo.caption)]
    separated = "commas" if config.caption_separator == "," else repr(config.caption_separator)
    if config.shuffle_tags and not rules.can_shuffle(captions):
        yield (
            "shuffle_tags has no effect because no caption has two or more tags, separated by "
            f"{separated}, {kept}"
        )
    if config.tag_dropout and not rules.can_shuffle(captions, 1):
        yield f"tag_dropout has no effect because no caption has a tag {kept}"
    if empty := [c for c in captions if rules.has_empty_tag(c)] if rules.draws_tags else []:
        yield (
            f"{counted(len(empty), 'caption')} with empty tags, first {quoted(empty[0])}: they are "
            "left out where tags are shuffled or dropped, and count neither there nor in keep_tags"
        )
    lines = [photo.caption.count("\n") for photo in photos]
    if config.caption_per_line and not any(lines):
        yield "caption_per_line has no effect because no caption file has two lines"
    elif any(lines) and not config.caption_per_line:
        yield (
            f"{counted(sum(map(bool, lines)), 'caption')} of several lines: they are joined to one "
            "caption; caption_per_line draws one of them in every epoch"
        )
    texts = [config.caption_prefix, config.caption_suffix, *config.validation_prompt]
    texts += [photo.caption for photo in photos]
    wild = [text for text in texts if WILD.search(text)]
    if config.wildcards and not wild:
        yield "wildcards has no effect because no caption has {a|b} or __file__"
    elif wild and not config.wildcards:
        yield (
            f"{quoted(wild[0])} is read as it is, with its braces or underscores; wildcards draws "
            "what they stand for"
        )


def _buckets(config: TrainConfig, components: Components) -> Buckets | None:
    """Crop sizes, with sides that the UNet can halve at each of its levels."""
    if not config.aspect_ratio_buckets:
        return None
    levels = len(components.unet.config.block_out_channels) - 1
    step = components.vae_factor * 2**levels
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
