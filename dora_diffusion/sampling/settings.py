"""Values of images to sample: a row for each, and the settings that all share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from PIL import Image

from dora_diffusion.config.fields import require
from dora_diffusion.config.prompts import (
    DENOISE,
    MOST_SIDE,
    MOST_STEPS,
    PIXELS,
    SAFE_STEP,
    near_side,
)
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.models.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from dora_diffusion.models.components import Components
    from dora_diffusion.numerics.weights import Strengths
    from dora_diffusion.sampling.stack import AdapterUse

    AdapterRef: TypeAlias = (
        str | PathLike[str] | tuple[str | PathLike[str], float | Strengths] | AdapterUse | None
    )
    """An adapter file or a run's folder; a pair of it and its strength or `Strengths`; or an
    `AdapterUse`. None is the base."""


class ImageRow(NamedTuple):
    """An image of a batch: its prompt, the seed of its noise, and its adapter."""

    prompt: str
    seed: int
    adapter: AdapterRef = None


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of image sampling.

    Attributes:
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598); 1 or less is none.
        scheduler: A name of `SCHEDULERS`; None is the model's own.
        width: Pixels; None is the model's own resolution.
        height: Pixels.
        negative_prompt: Negative prompt.
        image: Image to paint over, or into with a mask; cut to the size from the middle. Without
            it an inpainting model paints the whole image, as a text-to-image model does.
        mask_image: White where to paint, of the image's size.
        guidance_rescale: Share of the guided prediction that is brought back to the standard
            deviation of the unguided one (arXiv:2305.08891, section 3.4; 0.7 there); 0 is none.
        denoise: Share of the steps that are done on the image, from as much noise (Diffusers'
            ``strength``, A1111's denoising strength). None is `DENOISE`; an inpainting model has
            its pipeline's default.

    Raises:
        ConfigError: If a value cannot work.
    """

    steps: int = SampleSettings.validation_inference_steps
    guidance_scale: float = SampleSettings.validation_guidance_scale
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str = ""
    image: Image.Image | None = field(default=None, repr=False)
    mask_image: Image.Image | None = field(default=None, repr=False)
    guidance_rescale: float = 0.0
    denoise: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "width", "height"):
            self._check_whole(name, getattr(self, name))
        guidance, rescale = self.guidance_scale, self.guidance_rescale
        require(
            0 <= guidance < math.inf,
            f"guidance_scale is {guidance}; it must be 0 or more",
            "guidance_scale",
        )
        require(
            0 <= rescale <= 1,
            f"guidance_rescale is {rescale}; it must be between 0 and 1",
            "guidance_rescale",
        )
        if self.scheduler is not None:
            require(
                self.scheduler in SCHEDULERS,
                f"scheduler is {self.scheduler!r}; it must be one of {', '.join(SCHEDULERS)}",
                "scheduler",
            )
        sizes = [each and each.size for each in (self.image, self.mask_image)]
        require(
            self.mask_image is None or sizes[0] == sizes[1],
            f"a mask_image belongs to an image of its size; they are {sizes[1]} and {sizes[0]}",
            "mask_image",
        )
        self._check_denoise()

    @property
    def stated_denoise(self) -> float | None:
        """Denoising strength in an image's text."""
        return DENOISE if self.image is not None and self.denoise is None else self.denoise

    def size(self, resolution: int) -> tuple[int, int]:
        """Width and height of an image, in pixels.

        Args:
            resolution: The model's, for sides that are not set (`Components.default_resolution`).
        """
        return self.width or resolution, self.height or resolution

    def for_model(self, components: Components) -> SamplingSettings:
        """Return the settings that act on a model.

        Raises:
            ConfigError: If a side is not a multiple of the model's step in pixels.
        """
        self.check_sides(components.size_step, components.family.title)
        without = components.family.without_effect
        return replace(self, scheduler=None) if "scheduler" in without else self

    def check_sides(self, step: int, model: str) -> None:
        """Check that the sides are multiples of a model's step in pixels.

        Raises:
            ConfigError: If one is not.
        """
        for name, side in (("width", self.width or 0), ("height", self.height or 0)):
            require(
                side % step == 0,
                f"{name} is {side}; on {model} it must be a multiple of {step}, such as "
                f"{near_side(side, step)}",
                name,
            )

    @staticmethod
    def _check_whole(name: str, value: int | None) -> None:
        """Check a number of steps, or a side in pixels."""
        if value is None:
            return
        is_side = "steps" not in name
        most = MOST_SIDE if is_side else MOST_STEPS
        least = SAFE_STEP if is_side else 1
        require(value >= least, f"{name} is {value}; it must be at least {least}", name)
        require(value <= most, f"{name} is {value}; it must be at most {most}", name)
        require(
            not is_side or value % PIXELS == 0,
            f"{name} is {value}; it must be a multiple of {PIXELS}, such as "
            f"{near_side(value, SAFE_STEP)}",
            name,
        )

    def _check_denoise(self) -> None:
        """Check the denoising strength over an image."""
        share, steps = self.denoise, self.steps
        if share is None:
            return
        require(
            0 < share <= 1, f"denoise is {share:g}; it must be above 0 and at most 1", "denoise"
        )
        require(
            int(steps * share) >= 1,
            f"denoise {share:g} of {steps} steps is less than one step; raise one of them",
            "denoise",
        )
