"""Sample prompts with sd-scripts' options, and limits of images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.fields import Setting, require
from dora_diffusion.config.file import read_text
from dora_diffusion.config.problems import prefixed
from dora_diffusion.config.wording import quoted

PIXELS = 8
"""Width and height are multiples of this number of pixels."""
SAFE_STEP = PIXELS * max(family.patch for family in FAMILIES.values())
"""Number of pixels whose multiples are sides of images of every family."""
MOST_SIDE, MOST_STEPS = 8192, 1000
"""Limits of an image's sides in pixels, and of denoising steps."""
DENOISE = 0.75
"""Default denoising strength of image-to-image generation."""
# Option -> attribute, and the option as a setting.
_NUMBERS: dict[str, tuple[str, Setting]] = {
    "d": ("seed", Setting("--d", int, least=0)),
    "w": ("width", Setting("--w", int, least=SAFE_STEP, most=MOST_SIDE)),
    "h": ("height", Setting("--h", int, least=SAFE_STEP, most=MOST_SIDE)),
    "s": ("steps", Setting("--s", int, least=1, most=MOST_STEPS)),
    "l": ("guidance_scale", Setting("--l", float, least=0)),
}
_TEXTS = {"n": "negative", "ss": "scheduler"}
_DRIFT = "drift"
OPTIONS = (*_NUMBERS, *_TEXTS, _DRIFT)
"""Options of a line, without ``--``."""
# sd-scripts' names of schedulers -> ours.
_SCHEDULERS = {"k_euler": "euler", "k_euler_a": "euler_a", "dpmsolver++": "dpm++"}
MOST_CHARACTERS = 100_000
"""Most characters of a prompt."""


@dataclass(frozen=True)
class SamplePrompt:
    """Prompt of sample images with its sampling options; None: the value of the settings.

    Attributes:
        text: The prompt.
        negative: The negative prompt.
        seed: Seed of the first image; each further image adds 1.
        width: Width in pixels.
        height: Height in pixels.
        steps: Denoising steps.
        guidance_scale: Guidance scale (CFG scale).
        scheduler: Name of a scheduler.
        is_drift: The prompt has no token on purpose, to monitor language drift.
    """

    text: str
    negative: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    is_drift: bool = False


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
    if key in _TEXTS:
        require(bool(value), f"--{key} needs a value")
        return _TEXTS[key], _SCHEDULERS.get(value, value) if key == "ss" else value
    require(
        key in _NUMBERS,
        f"--{key} is not an option here; there is --n (negative prompt), --d (seed), --w, --h, "
        "--l (guidance scale), --s (steps), --ss (scheduler) and --drift",
    )
    name, setting = _NUMBERS[key]
    number = setting.read(value)
    require(
        name not in ("width", "height") or number % PIXELS == 0,
        f"--{key} is {value}; it must be a multiple of {PIXELS}, such as "
        f"{near_side(number, SAFE_STEP)}",
    )
    return name, number


def near_side(side: int, step: int) -> int:
    """Return the nearest side of an image that is a multiple of a step, in pixels."""
    return max(round(side / step), 1) * step


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
