"""An image that is wanted, and sample prompts with sd-scripts' options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import Need, Setting, flag, require
from dora_diffusion.config.file import read_text
from dora_diffusion.config.problems import Problems, prefixed
from dora_diffusion.config.schedulers import A1111_NAMES, SCHEDULERS
from dora_diffusion.config.wording import quoted

PIXELS = 8
"""Width and height are multiples of this number of pixels."""
SAFE_STEP = PIXELS * max(family.patch for family in FAMILIES.values())
"""Number of pixels whose multiples are sides of images of every family."""
MOST_SIDE, MOST_STEPS = 8192, 1000
"""Limits of an image's sides in pixels, and of denoising steps."""
STEPS, GUIDANCE_SCALE, DENOISE = 25, 7.5, 0.75
"""Defaults: denoising steps, guidance scale, denoising strength of image-to-image generation."""
SAMPLES: Mapping[str, str] = {
    "steps": "validation_inference_steps", "guidance_scale": "validation_guidance_scale",
}  # fmt: skip
"""Settings of an image, with those of a run's samples."""
MOST_CHARACTERS = 100_000
"""Most characters of a prompt."""
# Names of schedulers in sd-scripts -> ours.
_SCHEDULERS = {"k_euler": "euler", "k_euler_a": "euler_a", "dpmsolver++": "dpm++"}


def scheduler_flag() -> Any:
    """Return the setting of a scheduler."""
    return flag(
        None,
        "Scheduler, by these names or by A1111's, such as 'DPM++ 2M Karras'. Default: the model's "
        "own.",
        choices=tuple(SCHEDULERS),
        aliases={**A1111_NAMES, **_SCHEDULERS},
    )


@dataclass(frozen=True)
class ImageRequest:
    """An image that is wanted; what is not set is the model's own, or the caller's default.

    Each field but the adapter is a setting of ``generate`` with its flag and range (`SETTINGS`);
    sample prompts, serving and the app's form take them from here.

    Attributes:
        prompt: Prompt.
        seed: Seed of its noise.
        adapter: Its adapter, an `AdapterRef`; None: the base alone, or what is on for all images.
        negative_prompt: Negative prompt.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598); 1 or less is none.
        guidance_rescale: Share of the guided prediction that is brought back to the standard
            deviation of the unguided one (arXiv:2305.08891, section 3.4; 0.7 there); 0 is none.
        scheduler: A name of `SCHEDULERS`.
        width: Width in pixels.
        height: Height in pixels.
        image: File of an image to paint over, or into with a mask.
        mask_image: File of a mask of the image's size, white where to paint.
        denoise: Share of the steps that are done on the image, above 0 to 1.

    Raises:
        ConfigError: If a value is outside its range.
    """

    prompt: str = flag("", "Prompt; required, unless each entry of --adapters_file has one.")
    seed: int | None = flag(
        None, "Seed of the first image. Default: random, shown.", least=0, most=2**63 - 1
    )
    adapter: Any = None
    negative_prompt: str = flag("", "Negative prompt.")
    steps: int | None = flag(
        None,
        f"Denoising steps. Default: {STEPS}, of transformers 50; of LCM, Turbo and "
        "Lightning models and adapters what they are for, as of guidance and scheduler.",
        least=1,
        most=MOST_STEPS,
    )
    guidance_scale: float | None = flag(
        None,
        f"Guidance scale (CFG scale); 1 is none. Default: {GUIDANCE_SCALE}, of Z-Image 6, of "
        "FLUX.2-klein and Anima 4.",
        least=0,
    )
    guidance_rescale: float = flag(
        0.0,
        "Guidance rescale, against overexposed images of models with zero terminal SNR: 0.7 in "
        "arXiv:2305.08891. Default: 0, none.",
        least=0,
        most=1,
    )
    scheduler: str | None = scheduler_flag()
    width: int | None = flag(
        None, "Width in pixels. Default: the model's own.", least=SAFE_STEP, most=MOST_SIDE
    )
    height: int | None = flag(
        None, "Height in pixels. Default: the model's own.", least=SAFE_STEP, most=MOST_SIDE
    )
    image: str | None = flag(
        None, "Image to paint over, or into with a mask, cut to the size from the middle."
    )
    mask_image: str | None = flag(
        None,
        "Image of the same size as --image, white where to paint.",
        flags=("--mask_image", "--mask"),
    )
    denoise: float | None = flag(
        None,
        "Denoising strength (strength in Diffusers): how much of --image is painted over, above 0 "
        f"to 1. Default: {DENOISE}; of an inpainting model all.",
        needs=(Need("image"),),
        above=0,
        most=1,
    )

    def __post_init__(self) -> None:
        check_values({name: getattr(self, name) for name in SETTINGS})

    @property
    def known_seed(self) -> int:
        """The seed of an image that is to be sampled now.

        Raises:
            ConfigError: If it has none.
        """
        require(self.seed is not None, f"the image of {quoted(self.prompt)} has no seed", "seed")
        return int(self.seed or 0)

    @property
    def shared(self) -> tuple[Any, ...]:
        """Values that the images of a batch have in common."""
        own = ("prompt", "seed")
        return tuple(getattr(self, name) for name in SETTINGS if name not in own)


SETTINGS: Mapping[str, Setting] = {
    source.name: Setting.from_field(source)
    for source in fields(ImageRequest)
    if "help" in source.metadata
}
"""The settings of an image by name."""


def check_values(values: Mapping[str, Any]) -> None:
    """Check values of `SETTINGS` by name, and sides that cannot be of any model.

    Raises:
        ConfigError: If some cannot work, all in one message.
    """
    problems = Problems()
    for name, value in values.items():
        with problems.collect():
            SETTINGS[name].check(value)
            if name in ("width", "height"):
                require_multiple(name, value or 0)
    problems.raise_all()


def require_multiple(name: str, side: int, step: int = PIXELS, model: str = "") -> None:
    """Check that a side is a multiple of a step in pixels, of a model or of all.

    Raises:
        ConfigError: If it is not.
    """
    near = near_side(side, step if model else SAFE_STEP)
    subject = f"on {model} it" if model else "it"
    require(
        side % step == 0,
        f"{name} is {side}; {subject} must be a multiple of {step}, such as {near}",
        name,
    )


def near_side(side: int, step: int) -> int:
    """Return the nearest side of an image that is a multiple of a step, in pixels."""
    return max(round(side / step), 1) * step


@dataclass(frozen=True)
class SamplePrompt(ImageRequest):
    """Prompt of sample images with its sampling options.

    Attributes:
        is_drift: The prompt has no token on purpose, to monitor language drift.
    """

    is_drift: bool = False


# Options of a line -> settings of an image.
_SETTINGS = {
    "n": "negative_prompt", "d": "seed", "w": "width", "h": "height", "l": "guidance_scale",
    "s": "steps", "ss": "scheduler",
}  # fmt: skip
_DRIFT = "drift"
OPTIONS = (*_SETTINGS, _DRIFT)
"""Options of a line, without ``--``."""


def parse_prompt(line: str) -> SamplePrompt:
    """Read a line such as ``a photo of a sks dog --n blurry --d 7 --w 768 --h 512 --l 5 --s 30``.

    Raises:
        ConfigError: If an option is unknown, repeated or has an invalid value.

    Example:
        >>> parse_prompt("a sks dog --d 7 --w 768").seed
        7
    """
    text, *options = re.split(r"(?:^|\s+)--(?=\w)", line.strip())
    values: dict[str, Any] = {}
    with prefixed(f"the sample prompt {quoted(line)}", "validation_prompt"):
        require(bool(text), " has no text before its options")
        for option in options:
            key, _, value = (part.strip() for part in option.partition(" "))
            with prefixed(": "):
                name, read = _option(key, value)
            require(name not in values, f" has --{key} twice")
            values[name] = read
    return SamplePrompt(text, **values)


def _option(key: str, value: str) -> tuple[str, Any]:
    if key == _DRIFT:
        require(not value, f"--{key} takes no value {value!r}; put it at the line's end")
        return "is_drift", True
    require(
        key in _SETTINGS,
        f"--{key} is not an option here; there is --n (negative prompt), --d (seed), --w, --h, "
        "--l (guidance scale), --s (steps), --ss (scheduler) and --drift",
    )
    name = _SETTINGS[key]
    setting = replace(SETTINGS[name], name=f"--{key}")
    require(bool(value) or setting.kind is not str, f"--{key} needs a value")
    read = setting.read(value)
    if name in ("width", "height"):
        require_multiple(setting.name, read)
    return name, read


def read_prompts(file: str | Path) -> list[str]:
    """Read a file of sample prompts, without empty lines and comments (``#``).

    Raises:
        ConfigError: If the file cannot be read, has no prompt, or a line is not valid; the message
            has its number.
    """
    lines = read_text(file, "sample_prompts", "sample_prompts").splitlines()
    prompts = {
        n: line.strip() for n, line in enumerate(lines, 1) if not re.match(r"\s*(#|$)", line)
    }
    require(bool(prompts), f"sample_prompts {file} has no prompt", "sample_prompts")
    for number, line in prompts.items():
        with prefixed(f"{file}, line {number}: ", "sample_prompts"):
            parse_prompt(line)
    return list(prompts.values())
