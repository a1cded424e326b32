"""Images from a loaded model: for previews, class images, the app and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.scope import norm_scope, row_scope
from dora_diffusion.config.exclusions import refuse
from dora_diffusion.config.fields import require, require_positive
from dora_diffusion.config.images import DENOISE
from dora_diffusion.data.crops import cut, plan_crop
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import quiet_libraries
from dora_diffusion.models.offload import in_turns
from dora_diffusion.sampling.conditioning import Rows, prompt_arguments, warn_of_settings
from dora_diffusion.sampling.settings import SamplingSettings

OnStep = Callable[[int, int], None]
"""Callback with (steps done, steps in all)."""


class BrokenImageError(ValueError):
    """Sampling gave NaN, or an image that is black all over."""


def generate_images(
    components: Components,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    adapters: Sequence[str | None] | None = None,
    batch_size: int = 4,
    on_step: OnStep | None = None,
    require_finite: bool = False,
) -> list[Image.Image]:
    """Sample one image per seed, with whatever adapters are on, or each with its own.

    Each image has a generator of its own on the CPU, so that a seed gives the same image
    alone, in a batch (up to float rounding) and on another device.

    Args:
        components: The loaded model; its modules' train or eval mode is restored.
        prompt: One prompt for all; or one per seed, which may differ within a batch.
        seeds: One per image.
        settings: Steps, guidance, size, and the image that an inpainting model paints into.
        adapters: The name of each image's adapter, None for the base, as `load_adapter` or an
            `AdapterPool` named them: a batch shares the base's products, and the noise schedule.
        batch_size: Images at once.
        on_step: Called with (steps done, steps in all).
        require_finite: Refuse images that hold NaN, which becomes black, or are black all over.

    Raises:
        ValueError: If prompts or adapters are not one per seed, or the model lacks an adapter.
        ConfigError: If the model's pipeline does not support a setting.
        BrokenImageError: If an image is refused.

    Warns:
        UserWarning: For each setting without effect on the model, and once for each prompt beyond
            the token limit, naming the text that was cut.
    """
    require_positive("batch_size", batch_size)
    settings, rows = settings or SamplingSettings(), Rows(prompt, seeds, adapters)
    sampler = Sampler(components, settings.for_model(components), batch_size, require_finite)
    warn_of_settings(components, rows, settings)
    return sampler.sample(rows, on_step)


@dataclass(frozen=True)
class Sampler:
    """Sampler of images that have a model and settings in common.

    Attributes:
        components: The model.
        settings: How the images are sampled.
        batch_size: Images at once.
        require_finite: Refuse images that hold NaN or are black all over.
    """

    components: Components
    settings: SamplingSettings
    batch_size: int
    require_finite: bool

    def sample(self, rows: Rows, on_step: OnStep | None) -> list[Image.Image]:
        """Sample an image for each row."""
        images = list[Image.Image]()
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        with self._scopes(is_mixed=bool(rows.adapters)):
            sampling = Pass.of(self.components, self.settings)
            for done, batch in enumerate(batches):
                report = _reporter(on_step, done, len(batches))
                with self._norms_kept(batch.adapters) if batch.adapters else nullcontext():
                    pixels = sampling.sample(batch, report)
                if self.require_finite:
                    _require_finite(pixels, batch.seeds)
                images += sampling.pipeline.image_processor.numpy_to_pil(np.nan_to_num(pixels))
        return images

    @contextmanager
    def _scopes(self, *, is_mixed: bool) -> Iterator[None]:
        """Open the scopes of all batches."""
        components = self.components
        with (
            components.eval_mode(),
            torch.no_grad(),
            nullcontext() if is_mixed else self._norms_kept(),
            sliced_decoding(components.vae),
            any_latent_channels(components) if self.settings.mask_image else nullcontext(),
            quiet_libraries(),
        ):
            yield

    def _norms_kept(self, rows: Sequence[str | None] | None = None) -> AbstractContextManager[None]:
        """Keep every norm, computed once on its model's device: no parameter changes meanwhile."""
        components, scope = self.components, norm_scope
        models = components.adaptable().values()
        if rows:
            require_adapters(models, rows)
            scope = partial(row_scope, rows=rows, partly=True, cache=components.norms)
        if components.offload_to is not None:
            return in_turns(components, components.offload_to, scope)
        return scope(*models)


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
        refuse(settings, components.family, components.name)
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


def _require_finite(pixels: np.ndarray, seeds: Sequence[int]) -> None:
    for seed, image in zip(seeds, pixels, strict=True):
        if not np.isfinite(image).all():
            raise BrokenImageError(
                f"the image of seed {seed} is not finite (it would be black): float16 overflows in "
                "some models, above all in SDXL's own VAE; or the adapter's values or strength are "
                "too large. Try --dtype bfloat16 or float32, or a lower strength"
            )
        if not (image * 255).round().any():
            raise BrokenImageError(
                f"the image of seed {seed} is black all over; try another precision, a lower "
                "strength of the adapter, or a lower guidance scale"
            )


def _reporter(on_step: OnStep | None, batch: int, batches: int) -> Callable[..., dict[str, Any]]:
    def report(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Some schedulers take more steps than were requested.
        steps = pipeline.num_timesteps
        if on_step is not None:
            on_step(batch * steps + step + 1, batches * steps)
        return tensors

    return report
