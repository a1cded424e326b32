"""Settings that the images of a batch share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from dora_diffusion.config.fields import require
from dora_diffusion.config.images import (
    DENOISE,
    GUIDANCE_SCALE,
    SETTINGS,
    STEPS,
    check_values,
    require_multiple,
)
from dora_diffusion.data.images import open_photo

if TYPE_CHECKING:
    from dora_diffusion.config.images import ImageRequest
    from dora_diffusion.models.components import Components
    from dora_diffusion.numerics.weights import Strengths
    from dora_diffusion.sampling.stack import AdapterUse

    AdapterRef: TypeAlias = (
        str | PathLike[str] | tuple[str | PathLike[str], float | Strengths] | AdapterUse | None
    )
    """An adapter file or a run's folder; a pair of it and its strength or `Strengths`; or an
    `AdapterUse`. None is the base."""


_FILES = {"image", "mask_image"}


@dataclass(frozen=True)
class SamplingSettings:
    """Settings that the images of a batch share, as `ImageRequest` describes them.

    Attributes:
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        scheduler: A name of `SCHEDULERS`; None is the model's own.
        width: Pixels; None is the model's own resolution.
        height: Pixels.
        negative_prompt: Negative prompt.
        image: Image to paint over, or into with a mask; cut to the size from the middle. Without
            it an inpainting model paints the whole image, as a text-to-image model does.
        mask_image: White where to paint, of the image's size.
        guidance_rescale: Guidance rescale.
        denoise: Share of the steps that are done on the image, from as much noise (Diffusers'
            ``strength``, A1111's denoising strength). None is `DENOISE`; an inpainting model has
            its pipeline's default.

    Raises:
        ConfigError: If a value cannot work.
    """

    steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    negative_prompt: str = ""
    image: Image.Image | None = field(default=None, repr=False)
    mask_image: Image.Image | None = field(default=None, repr=False)
    guidance_rescale: float = 0.0
    denoise: float | None = None

    def __post_init__(self) -> None:
        checked = SETTINGS.keys() - _FILES
        check_values({name: value for name, value in vars(self).items() if name in checked})
        sizes = [each and each.size for each in (self.image, self.mask_image)]
        require(
            self.mask_image is None or sizes[0] == sizes[1],
            f"a mask_image belongs to an image of its size; they are {sizes[1]} and {sizes[0]}",
            "mask_image",
        )
        require(
            int(self.steps * (self.denoise or 1)) >= 1,
            f"denoise {self.denoise or 1:g} of {self.steps} steps is less than one step; raise one "
            "of them",
            "denoise",
        )

    @classmethod
    def of(cls, request: ImageRequest, **defaults: Any) -> SamplingSettings:
        """Return the settings of a request, with its files opened.

        Args:
            request: The request.
            defaults: Values of fields that the request does not set.

        Raises:
            ConfigError, PhotoError: If a value cannot work, or a file cannot be read.
        """
        values = {source.name: getattr(request, source.name, None) for source in fields(cls)}
        usual = {name: setting.default for name, setting in SETTINGS.items()}
        stated = {n: v for n, v in values.items() if v is not None and v != usual.get(n)}
        stated |= {name: open_photo(stated[name]) for name in _FILES & stated.keys()}
        return cls(**{**defaults, **stated})

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
            require_multiple(name, side, step, model)
