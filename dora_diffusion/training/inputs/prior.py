"""Class images for prior preservation. Matching images are reused, missing ones generated."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.kohya import folder_name, folders_in
from dora_diffusion.config.wording import counted, quoted
from dora_diffusion.data.captions import contains_token
from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import Photo, list_photos, nested_photos, read_photos
from dora_diffusion.data.sampler import generator_for
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.images import save_image
from dora_diffusion.sampling.load import sampling_defaults
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.events import ClassImagesAnnounced, ClassImagesProgress, OnEvent
from dora_diffusion.training.inputs.subject import Subject
from dora_diffusion.training.processes import shards_model

# Folder of class images in the output folder, and prefix of the names of folders of generated ones.
CLASS_IMAGES, _GENERATED = "class_images", "generated-"
# Prompt and seeds -> one image per seed.
Generate = Callable[[str, Sequence[int]], list[Image.Image]]


def class_prompts(
    subject: Subject, captions: Sequence[str], as_class: Callable[[str], str]
) -> list[str]:
    """Return the prompts of class images: the class prompt, or the class caption of each caption.

    Raises:
        ConfigError: If a prompt contains the token, or the class word is unknown.
    """
    config = subject.settings
    if config.class_prompt:
        if subject.token and contains_token(config.class_prompt, subject.token):
            raise ConfigError(
                f"class_prompt {quoted(config.class_prompt)} contains the token {subject.token!r}; "
                "describe other members of the class without it",
                "class_prompt",
            )
        return [config.class_prompt]
    if not subject.token:
        raise ConfigError(
            "prior preservation with token '' needs class_prompt: without a token, captions "
            "cannot be converted to captions of the class",
            "class_prompt",
        )
    if not subject.class_word:
        raise ConfigError(
            "prior preservation needs the class of the subject; set class_word or class_prompt",
            "class_word",
        )
    return list(dict.fromkeys(map(as_class, captions)))


def check_image_free(subject: Subject, captions: Sequence[str]) -> None:
    """Check that the image-free prior does not preserve the predictions that are trained.

    The prior preserves the prediction for the class caption of each caption. The two captions must
    differ.

    Raises:
        ConfigError: If the token is empty, or a caption lacks it.
    """
    why = "the image-free prior would preserve the very prediction that is trained"
    if not subject.token:
        raise ConfigError(
            f"prior_preservation_mode image-free with token '': {why}; choose a token, or use "
            "prior_preservation_mode images with class_prompt",
            "prior_preservation_mode",
        )
    if not subject.class_word:
        raise ConfigError(
            "prior preservation needs the class of the subject; set class_word", "class_word"
        )
    lacking = [caption for caption in captions if not contains_token(caption, subject.token)]
    if lacking:
        raise ConfigError(
            f"{counted(len(lacking), 'caption')} of {len(captions)} without the token "
            f"{subject.token!r} (first: {quoted(lacking[0])}): for them {why}; add the token to "
            "each caption, or use prior_preservation_mode images",
            "prior_preservation_mode",
        )


def _sampling_of(config: TrainConfig, components: Components) -> dict[str, Any]:
    """Return the steps and guidance of class images, which are the base model's own."""
    if config.sample_model:  # The run's are those of samples, on another model.
        return sampling_defaults(components)
    return {
        "steps": config.validation_inference_steps,
        "guidance_scale": config.validation_guidance_scale,
    }


def class_images(
    subject: Subject,
    components: Components,
    prompts: Sequence[str],
    accelerator: Any,
    on_event: OnEvent,
) -> list[Photo]:
    """Return the class images of a subject, generating missing ones with the base model.

    Args:
        subject: The subject.
        components: The model, without adapters.
        prompts: See `class_prompts`.
        accelerator: Processes. The first one generates while the others wait.
        on_event: Called with `ClassImagesAnnounced` and `ClassImagesProgress`.
    """
    config = subject.settings
    side = config.resolution or components.default_resolution
    settings = SamplingSettings(width=side, height=side, **_sampling_of(config, components))

    announcer = _Announcer.of(config, on_event)

    def generate(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        if shards_model(accelerator):
            raise ConfigError(
                "sharding fsdp cannot generate class images, which need the whole model in a "
                "process; generate them with a run of one process (--max_train_steps 1), and set "
                "--class_data_dir to their folder",
                "sharding",
            )
        return generate_images(
            components,
            prompt,
            seeds,
            settings,
            batch_size=config.sample_batch_size,
            on_step=announcer.on_step,
            require_finite=True,
        )

    # Settings that change the images, if they are not the defaults.
    names = ("clip_skip", "max_token_length", "vae_tile_size")
    other = {n: v for n in names if (v := getattr(config, n)) != getattr(TrainConfig, n)}
    with accelerator.main_process_first():
        identity = f"{components.identity()} {settings}{other or ''}"
        named = ensure_class_images(config, prompts, identity, generate, announcer.on_image)
    if config.class_prompt:  # It takes precedence over the names of folders.
        named = dict.fromkeys(named, "")
    images = read_photos(list(named), "", skip_unreadable=True)
    # An image without a .txt file has the caption of its folder, or else the next prompt.
    return [
        replace(image, caption=image.caption or named[image.path] or prompts[i % len(prompts)])
        for i, image in enumerate(images)
    ]


@dataclass
class _Announcer:
    """Reports class images that are generated, with an estimate of the time.

    The estimate is based on the second denoising step of the first batch, since the first step
    includes one-time costs.
    """

    on_event: OnEvent
    batch_size: int
    folder: Path
    advice: str = ""
    missing: int = 0
    begun: float = 0.0
    is_timed: bool = False

    @classmethod
    def of(cls, config: TrainConfig, on_event: OnEvent) -> _Announcer:
        """Build the announcer of a subject's class images."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `ensure_class_images` repeats them.
            missing = missing_class_images(config)
        return cls(on_event, config.sample_batch_size, missing.folder, missing.advice)

    def on_image(self, done: int, total: int) -> None:
        """Report the number of existing images, first before any is generated."""
        if not self.missing:
            self.missing = total - done
            folder, advice = str(self.folder), self.advice
            self.on_event(ClassImagesAnnounced(self.missing, folder=folder, advice=advice))
        self.on_event(ClassImagesProgress(done, total))

    def on_step(self, step: int, steps: int) -> None:
        """Measure the time of a denoising step."""
        if self.is_timed:
            return
        if step > 1:
            batches = math.ceil(self.missing / self.batch_size)
            seconds = (time.perf_counter() - self.begun) * steps * batches
            self.on_event(ClassImagesAnnounced(self.missing, seconds, str(self.folder)))
            self.is_timed = True
        self.begun = time.perf_counter()


def ensure_class_images(
    config: TrainConfig,
    prompts: Sequence[str],
    identity: str,
    generate: Generate,
    on_image: Callable[[int, int], None],
) -> dict[Path, str]:
    """Ensure that ``num_class_images`` exist, generating missing ones.

    Images of the user (`own_class_images`) are used first. Generated images go into a sub-folder of
    `generated_folder` named by a hash of everything that they depend on, so that images of other
    prompts or another model are never reused. Each image has its own seed, so that an interrupted
    run can continue.

    Args:
        config: Settings of a subject: class folder, number of images, seed and batch size.
        prompts: Prompts to cycle through.
        identity: Everything else that the images depend on: model, size and sampling.
        generate: Generates images.
        on_image: Called with (existing images, required images), first before any is generated.

    Returns:
        Each image with the caption of its folder.
    """
    folder, count, size = class_folder(config), config.num_class_images, config.sample_batch_size
    user_images = own_class_images(folder)
    if len(user_images) > count:
        warnings.warn(
            f"{folder} has {len(user_images)} class images, but num_class_images {count} are used",
            stacklevel=3,
        )
    user_images = user_images[:count]
    text = "\n".join([identity, str(config.seed), *prompts])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    new_folder = generated_folder(config) / f"{_GENERATED}{digest}"
    paths = [new_folder / f"class-{number:05d}.png" for number in range(count - len(user_images))]
    missing: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        if not path.is_file():
            missing.setdefault(prompts[number % len(prompts)], []).append(number)
    done = count - sum(map(len, missing.values()))
    if missing:
        on_image(done, count)
    for prompt, numbers in missing.items():
        for batch in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            drawn = (generator_for("class image", config.seed, number) for number in batch)
            seeds = [generator.initial_seed() % 2**32 for generator in drawn]
            for number, image in zip(batch, generate(prompt, seeds), strict=True):
                # The caption first, and both by rename, so that every existing image is complete.
                save_text(paths[number].with_suffix(".txt"), prompt + "\n")
                save_image(image, paths[number])
            done += len(batch)
            on_image(done, count)
    return dict(user_images) | dict.fromkeys(paths, "")


def class_folder(config: TrainConfig) -> Path:
    """Return the folder of a subject's class images."""
    return Path(config.class_data_dir or Path(config.output_dir) / CLASS_IMAGES).expanduser()


def generated_folder(config: TrainConfig) -> Path:
    """Return the folder into which the class images of a subject are generated.

    It is the folder of class images if it is new or contains only generated ones, so that several
    runs can share them. A folder with other files is the user's, and only read: then the images go
    into the output folder.
    """
    folder = class_folder(config)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    is_shared = all(name.startswith(_GENERATED) for name in names)
    return folder if is_shared else Path(config.output_dir).expanduser() / CLASS_IMAGES


@dataclass(frozen=True)
class MissingClassImages:
    """Class images that a subject lacks.

    Attributes:
        present: Number of the user's images that are used.
        count: Number of images that a run generates, unless it has done so before.
        folder: Folder that they are written to.
        advice: Setting that needs fewer of them; may be empty.
    """

    present: int
    count: int
    folder: Path
    advice: str


def missing_class_images(config: TrainConfig) -> MissingClassImages:
    """Return the class images that a subject lacks, without the base model.

    Warns:
        UserWarning: As `own_class_images`.
    """
    present = min(len(own_class_images(class_folder(config))), config.num_class_images)
    advice = "--prior_preservation_mode image-free is a prior without class images"
    if present:
        advice = f"--num_class_images {present} uses only the {present} that are there"
    folder, advice = generated_folder(config), advice if config.has_photos else ""
    return MissingClassImages(present, config.num_class_images - present, folder, advice)


def own_class_images(folder: Path) -> list[tuple[Path, str]]:
    """Return the class images that the user provides, each with the caption of its folder.

    Images are in the folder itself, without a caption, and in sub-folders named as in kohya's
    scripts: images in ``1_dog`` have the caption ``dog``.

    Warns:
        UserWarning: If other sub-folders contain images, or a sub-folder has repeats.
    """
    inner = folders_in(folder) if folder.is_dir() else []
    named = {path: name for path in inner if (name := folder_name(path))}
    images = []
    for directory, (repeats, text) in {folder: (1, ""), **named}.items():
        with contextlib.suppress(PhotoError):
            images += [(path, text) for path in list_photos(directory, warn_of_nested=False)]
        if repeats > 1:
            warnings.warn(
                f"{directory}: its {repeats} repeats have no effect, since all class images are "
                "used equally often",
                stacklevel=3,
            )
    unnamed = [path for path in inner if path not in named and not path.name.startswith(_GENERATED)]
    if left_out := nested_photos(unnamed):
        warnings.warn(
            f"{folder}: ignored {left_out}; put class images into the folder itself, or into "
            "folders with names such as '1_dog'",
            stacklevel=3,
        )
    return images
