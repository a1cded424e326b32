"""Class images for prior preservation: reused where they fit, generated where they are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.captions import contains_token
from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import list_photos
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.images import save_png
from dora_diffusion.training.subject import Subject
from dora_diffusion.wording import counted, quoted

_PREFIX = "class-"

# Prompt and seeds -> one image per seed.
Generate = Callable[[str, Sequence[int]], list[Image.Image]]


@dataclass(frozen=True)
class ClassImagePlan:
    """One image to have: its file, prompt and seed."""

    path: Path
    prompt: str
    seed: int


def class_prompts(config: TrainConfig, subject: Subject, captions: Sequence[str]) -> list[str]:
    """The prompts of class images: the class prompt, or each caption with the token taken out.

    Raises:
        ConfigError: If a prompt would still contain the token, or no class word is known.
    """
    if config.class_prompt:
        if subject.token and contains_token(config.class_prompt, subject.token):
            raise ConfigError(
                f"class_prompt {quoted(config.class_prompt)} contains the token {subject.token!r}; "
                "describe other members of the class, without it"
            )
        return [config.class_prompt]
    if not subject.token:
        raise ConfigError(
            "prior preservation with token '' needs class_prompt: without a token, captions "
            "cannot be turned into captions of the class"
        )
    if not subject.class_word:
        raise ConfigError(
            "prior preservation needs to know what the subject is; set class_word or class_prompt"
        )
    return list(dict.fromkeys(subject.class_caption(caption) for caption in captions))


def check_image_free(subject: Subject, captions: Sequence[str]) -> None:
    """Refuse an image-free prior that would hold the very prediction that is being trained.

    The prior keeps the prediction for each caption's class caption, which must be another one.

    Raises:
        ConfigError: If there is no token, or a caption lacks it.
    """
    why = "the image-free prior would hold the very prediction that is being trained"
    if not subject.token:
        raise ConfigError(
            f"prior_preservation_mode image-free with token '': {why}; choose a token, or use "
            "prior_preservation_mode images with class_prompt"
        )
    if not subject.class_word:
        raise ConfigError("prior preservation needs to know what the subject is; set class_word")
    lacking = [caption for caption in captions if not contains_token(caption, subject.token)]
    if lacking:
        raise ConfigError(
            f"{counted(len(lacking), 'caption')} of {len(captions)} without the token "
            f"{subject.token!r} (first: {quoted(lacking[0])}): for them {why}; put the token into "
            "each caption, or use prior_preservation_mode images"
        )


def ensure_class_images(
    folder: Path,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    identity: str,
    generate: Generate,
    batch_size: int,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Have ``count`` class images, generating those that are missing.

    Images that the user put into the folder count first. Generated ones go into a sub-folder named
    after everything that determines them, so that those of other prompts or another model are
    never reused; each is made from a seed of its own, so that an interrupted run continues.

    Args:
        folder: The class folder.
        prompts: Prompts to cycle through.
        count: How many images to have.
        seed: The run's seed.
        identity: What the images depend on besides: model, size and sampling.
        generate: Makes images.
        batch_size: Images per call of ``generate``.
        on_image: Called with (images there, images wanted), first before any is generated.
    """
    given = _given_images(folder)
    if len(given) >= count:
        return given[:count]
    digest = hashlib.sha256("\n".join([identity, str(seed), *prompts]).encode()).hexdigest()[:12]
    plans = _plan(folder / f"generated-{digest}", prompts, count - len(given), seed)
    missing = [plan for plan in plans if not plan.path.is_file()]
    done = count - len(missing)
    if missing and on_image is not None:
        on_image(done, count)
    for group in _batches(missing, batch_size):
        images = generate(group[0].prompt, [plan.seed for plan in group])
        for plan, image in zip(group, images, strict=True):
            _save(plan, image)
        done += len(group)
        if on_image is not None:
            on_image(done, count)
    return given + [plan.path for plan in plans]


def _given_images(folder: Path) -> list[Path]:
    try:
        # Those that were generated lie in sub-folders.
        return list_photos(folder, warn_of_nested=False)
    except PhotoError:
        return []


def _plan(folder: Path, prompts: Sequence[str], count: int, seed: int) -> list[ClassImagePlan]:
    def drawn(number: int) -> int:
        return generator_for("class image", seed, number).initial_seed() % 2**32

    return [
        ClassImagePlan(folder / f"{_PREFIX}{i:05d}.png", prompts[i % len(prompts)], drawn(i))
        for i in range(count)
    ]


def _batches(plans: Sequence[ClassImagePlan], size: int) -> list[list[ClassImagePlan]]:
    """Group plans of one prompt, at most ``size`` at a time."""
    by_prompt: dict[str, list[ClassImagePlan]] = {}
    for plan in plans:
        by_prompt.setdefault(plan.prompt, []).append(plan)
    return [
        group[start : start + size]
        for group in by_prompt.values()
        for start in range(0, len(group), size)
    ]


def _save(plan: ClassImagePlan, image: Image.Image) -> None:
    """Caption first, image last, both by rename: an image that is there is complete."""
    save_text(plan.path.with_suffix(".txt"), plan.prompt + "\n")
    save_png(image, plan.path)
