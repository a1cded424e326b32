"""Diffusers' pipeline of an image: from text, over an image, into an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_diffusion.config.fields import require
from dora_diffusion.config.images import DENOISE
from dora_diffusion.data.crops import cut, plan_crop
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.conditioning import Rows, prompt_arguments
from dora_diffusion.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Pass:
    """Pass of a batch through a pipeline.

    Attributes:
        components: The model.
        pipeline: Diffusers' pipeline over it.
        settings: Settings of the images.
    """

    components: Components
    pipeline: Any
    settings: SamplingSettings

    @classmethod
    def of(cls, components: Components, settings: SamplingSettings) -> Pass:
        """Choose the pipeline for a model and an image to paint over or into.

        Raises:
            ConfigError: If an inpainting model has an image and no mask.
        """
        components.family.refuse(components.name, vars(settings))
        inpaints, task = _inpaints(components), ""
        lacks_mask = settings.image is not None and settings.mask_image is None
        require(
            not (inpaints and lacks_mask),
            f"{components.name} is an inpainting model, which paints into an image by a mask; give "
            "image and mask_image (white where to paint)",
            "image",
        )
        if settings.image is not None and not inpaints:
            task = "Image2Image" if lacks_mask else "Inpainting"
        return cls(components, components.pipeline(settings.scheduler, task), settings)

    def sample(self, rows: Rows, report: Callable[..., dict[str, Any]]) -> np.ndarray:
        """Sample pixels ``(B, H, W, 3)`` in [0, 1], or NaN.

        Args:
            rows: Prompts, seeds and adapters.
            report: Diffusers' ``callback_on_step_end``.
        """
        images = self._image_arguments(len(rows))
        # A shared prompt would have one image's latents drawn for the whole batch.
        shared = rows.is_shared and "image" not in images
        pixels: np.ndarray = self.pipeline(
            **prompt_arguments(self.components, rows, self.settings, shared=shared),
            num_inference_steps=self.settings.steps,
            guidance_scale=self.components.family.pipeline_guidance(self.settings.guidance_scale),
            generator=[torch.Generator().manual_seed(seed) for seed in rows.seeds],
            callback_on_step_end=report,
            output_type="np",
            **images,
            **self._optional_arguments(),
        ).images
        return pixels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.settings.size(self.components.default_resolution)

    def _optional_arguments(self) -> dict[str, Any]:
        """Return the arguments that only some pipelines have.

        Raises:
            ConfigError: If this pipeline has no guidance rescale, and it is set.
        """
        known = inspect.signature(self.pipeline.__call__).parameters
        # Pipelines without a height read it from the image.
        options = dict[str, Any](zip(("width", "height"), self.size, strict=True))
        options = options if "height" in known else {}
        if self.settings.guidance_rescale:
            name, title = "guidance_rescale", self.components.family.title
            require(
                name in known,
                f"{name} is not in Diffusers' pipeline of {title}; leave it out",
                name,
            )
            options[name] = self.settings.guidance_rescale
        return options

    def _image_arguments(self, count: int) -> dict[str, Any]:
        """Return the arguments to paint over or into images; none without any."""
        settings, size, options = self.settings, self.size, dict[str, Any]()
        image, mask, inpaints = settings.image, settings.mask_image, _inpaints(self.components)
        if image is None:
            if not inpaints:
                return {}
            image, mask = Image.new("RGB", size), Image.new("L", size, 255)
            options = {"strength": 1.0}
        elif settings.denoise is not None or not inpaints:
            options = {"strength": DENOISE if settings.denoise is None else settings.denoise}
        multiple = self.components.size_step
        crop = plan_crop((image.height, image.width), size[::-1], multiple=multiple)
        if mask is not None:
            options["mask_image"] = [cut(mask.convert("L"), crop)] * count
        return {"image": [cut(image.convert("RGB"), crop)] * count, **options}


def _inpaints(components: Components) -> bool:
    return bool(components.family.image_arguments)


@contextmanager
def sliced_decoding(vae: Any) -> Iterator[None]:
    """Decode each image of a batch by itself: a decoder takes far more memory than the UNet.

    Its dtype stays: pipelines that encode would round one that overflows to the UNet's.
    """
    slices = vae.use_slicing
    upcasts = {name: vae.config[name] for name in ("force_upcast",) if name in vae.config}
    vae.use_slicing = True
    vae.register_to_config(**dict.fromkeys(upcasts, False))
    try:
        yield
    finally:
        vae.use_slicing = slices
        vae.register_to_config(**upcasts)


@contextmanager
def any_latent_channels(components: Components) -> Iterator[None]:
    """Have Diffusers' inpainting pipelines accept latents of any number of channels.

    They recognize a UNet of a text-to-image model by its 4 input channels, and compute with the
    autoencoder's.
    """
    unet, channels = components.denoiser, components.denoiser.config.in_channels
    if components.family.has_unet and not _inpaints(components):
        unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)
