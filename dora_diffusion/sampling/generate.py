"""Images from a loaded model: for previews, class images, the app and the command line."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler
from dora_diffusion.adapters.inject import require_adapters
from dora_diffusion.adapters.scope import norm_scope, row_scope
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import AnyModel
from dora_diffusion.config.fields import require, require_positive
from dora_diffusion.config.prompts import DENOISE, HIRES_DENOISE, MOST_SIDE, MOST_STEPS, PIXELS
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.config.wording import quoted
from dora_diffusion.data.captions import contains_token
from dora_diffusion.data.crops import cut, plan_crop
from dora_diffusion.formats.adapter.metadata import (
    READING,
    AdapterMetadata,
    split_triggers,
    stated_reading,
)
from dora_diffusion.formats.adapter.stored import read_metadata
from dora_diffusion.models.components import Components
from dora_diffusion.models.emphasis import has_weights, plain_parts, unread_syntax
from dora_diffusion.models.load import load_components, quiet_libraries
from dora_diffusion.models.memory import auto_precision, describe_device
from dora_diffusion.models.offload import in_turns, place_model
from dora_diffusion.models.precision import PRECISION_DTYPES, require_computes
from dora_diffusion.models.schedulers import (
    SCHEDULERS,
    FewSteps,
    few_steps_of_model,
    few_steps_of_name,
)
from dora_diffusion.models.text import (
    Conditioning,
    chunk_count,
    encode_negative,
    encode_prompts,
    encode_unconditional,
    encode_weighted,
    warn_of_truncation,
)
from dora_diffusion.models.words import have_own_words
from dora_diffusion.numerics.devices import default_device
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.detail import NO_PASS, Detail, find_region
from dora_diffusion.sampling.stack import AdapterUse, Schedule, attach_stack, scheduled

MOST_HIRES = 4


class BrokenImageError(ValueError):
    """Sampling gave NaN, or an image that is black all over."""


@check_arguments()
@dataclass(frozen=True)
class SamplingSettings:
    """Settings of image sampling.

    Attributes:
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598); 1 or less is none.
        scheduler: A name of `SCHEDULERS`; None is the model's own.
        width: Pixels; None is what the model was trained at.
        height: Pixels.
        negative_prompt: What to steer away from.
        image: What is painted over, or into where there is a mask; cut to the size from the middle.
            Without it an inpainting model paints the whole image, as a text-to-image model does.
        mask_image: White where to paint, of the image's size.
        guidance_rescale: Share of the guided prediction that is brought back to the standard
            deviation of the unguided one (arXiv:2305.08891, section 3.4; 0.7 there); 0 is none.
        denoise: Share of the steps that are done on the image, from as much noise (Diffusers'
            ``strength``, A1111's denoising strength). None is `DENOISE`; of an inpainting model
            what its pipeline takes.
        hires: Factor of both sides for a second pass, which paints over the enlarged image of the
            first one; None is no second pass.
        hires_denoise: ``denoise`` of the second pass.
        hires_steps: ``steps`` of the second pass; None is as many.
        strength_schedules: By name of an adapter (`stack.name_of`), how its strength changes over
            the steps of each pass; of adapters that are on for all images.
        detail: What of each finished image is painted again in more detail.
        prompt_weights: Read weights and breaks in prompts, as A1111 does (`models.emphasis`).

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
    hires: float | None = None
    hires_denoise: float = HIRES_DENOISE
    hires_steps: int | None = None
    strength_schedules: Mapping[str, Schedule] = field(default_factory=dict)
    prompt_weights: bool = False
    detail: Detail | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "width", "height", "hires_steps"):
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
        self._check_hires()
        self._check_passes()

    @property
    def stated_denoise(self) -> float | None:
        """Denoising strength in an image's text, of the second pass where there is one."""
        if self.hires:
            return self.hires_denoise
        return DENOISE if self.image is not None and self.denoise is None else self.denoise

    @staticmethod
    def _check_whole(name: str, value: int | None) -> None:
        """Check a number of steps, or a side in pixels."""
        if value is None:
            return
        is_side = "steps" not in name
        most, more = MOST_SIDE if is_side else MOST_STEPS, (value // PIXELS + 1) * PIXELS
        require(value >= 1, f"{name} is {value}; it must be at least 1", name)
        require(value <= most, f"{name} is {value}; it must be at most {most}", name)
        require(
            not is_side or value % PIXELS == 0,
            f"{name} is {value}; it must be a multiple of {PIXELS}, such as {more}",
            name,
        )

    def _check_hires(self) -> None:
        """Check a second pass, of images from text alone."""
        if self.hires is None:
            return
        require(
            self.image is None,
            "a second pass (hires) is of images from text alone; leave it out, or the image to "
            "start from",
            "hires",
        )
        require(
            1 < self.hires <= MOST_HIRES,
            f"hires is {self.hires:g}; it must be above 1 and at most {MOST_HIRES}",
            "hires",
        )
        for name in ("width", "height"):
            side = getattr(self, name) or 0
            require(
                side * self.hires <= MOST_SIDE,
                f"hires {self.hires:g} of a {name} of {side} is above {MOST_SIDE}",
                "hires",
            )

    def _check_passes(self) -> None:
        """Check what paints over an image, in one pass or as the second one."""
        second = self.steps if self.hires_steps is None else self.hires_steps
        passes = [("denoise", self.denoise, self.steps)]
        # Without a second pass its steps are none to look at.
        passes += [("hires_denoise", self.hires_denoise, second if self.hires else MOST_STEPS)]
        if self.detail is not None:
            passes += [("detail_denoise", self.detail.denoise, self.steps)]
        for name, share, steps in passes:
            if share is None:
                continue
            require(0 < share <= 1, f"{name} is {share:g}; it must be above 0 and at most 1", name)
            require(
                int(steps * share) >= 1,
                f"{name} {share:g} of {steps} steps is less than one step; raise one of them",
                name,
            )


def load_adapted(  # noqa: PLR0913 - keywords, each documented
    base: AnyModel,
    adapter: str | Path | Sequence[AdapterUse] | None = None,
    *,
    strength: float | Strengths = 1.0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    compile: bool = False,
    offload: str = "none",
    clip_skip: int | None = None,
    max_token_length: int | None = None,
) -> tuple[Components, AdapterMetadata]:
    """Load a base model with an adapter and its trained tokens on it, ready to sample from.

    Args:
        base: A model as `load_components` takes it.
        adapter: An adapter file or the output folder of a run; several with their strengths
            (`attach_stack`); None samples the base.
        strength: 0 is exactly the base, 1 exactly the adapter; or all of its `Strengths`. Of
            several each has its own.
        alpha: What the adapter was trained with, for a file that does not say it.
        dtype: Of the base; an adapter always computes its norms in float32.
        device: None is the accelerator where there is one, else the CPU.
        compile: Compile the UNet's repeated blocks when they first run (`compile_blocks`).
        offload: ``"model"`` has each part on the device only while it computes (`generate_images`).
        clip_skip: Last layers of the text encoders to leave out; None: what adapter or base say.
        max_token_length: Tokens of a prompt that are read; None: what adapter or base say.

    Returns:
        The model, and the adapter's metadata, such as its trigger words; of several what they
        agree in, and all trigger words.

    Raises:
        ModelNotFoundError, UnsupportedModelError: If the base cannot be loaded.
        AdapterFormatError, ValueError: If the adapter cannot be read, or does not fit.
        ConfigError: If the device does not compute so, or nothing compiles for it.
    """
    device = default_device() if device is None else device
    require_computes(device, dtype)
    if compile:
        require_compiler(device)
    if isinstance(adapter, str | Path):
        adapter = [AdapterUse(adapter, Strengths.of(strength))]
    uses = adapter or ()
    facts = [read_metadata(use.path) for use in uses]
    loaded = load_components(base, dtype=dtype, adapters=facts)
    components = place_model(loaded.reading(clip_skip, max_token_length), device, offload)
    if compile:
        compile_blocks(components.unet)
    if not uses:
        return components, AdapterMetadata()
    metadata = attach_stack(components, uses, alpha)
    for model in components.adaptable().values():
        model.eval()
    return as_stated(components, metadata, clip_skip, max_token_length), metadata


def load_model(base: AnyModel, adapter: Path | Sequence[AdapterUse] | None) -> Components:
    """A model to sample from as a run loaded it, in half precision on a GPU.

    Raises:
        ValueError: If a part of it cannot be had.
    """
    dtype = PRECISION_DTYPES[auto_precision(describe_device())]
    return load_adapted(base, adapter, dtype=dtype)[0]


def as_stated(components: Components, metadata: AdapterMetadata, *given: int | None) -> Components:
    """The model, reading prompts as an adapter's file says where nothing else is given.

    Args:
        components: The model.
        metadata: The file's.
        given: Clip skip and length of prompts.
    """
    stated = stated_reading(metadata.extra)
    pairs = zip(READING, given, strict=True)
    left = (stated.get(name) if value is None else None for name, value in pairs)
    return components.reading(*left, is_told=False)


def few_steps(components: Components, adapters: Sequence[str] = ()) -> tuple[str, FewSteps] | None:
    """Find an adapter or a model that was distilled to few denoising steps (LCM, Turbo, Lightning).

    Args:
        components: The model: its scheduler, its UNet and its name may show it.
        adapters: Names of the adapters on it (`UsedAdapter.name`), which come first.

    Returns:
        The name of what shows it, and the settings of sampling that it needs; None where nothing
        does.
    """
    for name in adapters:
        if few := few_steps_of_name(name):
            return name, few
    is_input = bool(components.unet.config.time_cond_proj_dim)
    few = few_steps_of_model(components.scheduler_config, guidance_is_input=is_input)
    few = few or few_steps_of_name(Path(components.name).name)
    return few and (components.name, few)


def lacks_trigger(prompt: str, metadata: AdapterMetadata) -> bool:
    """Return whether a prompt leaves out the adapter's trigger word, or all of several."""
    tokens = [trigger.partition(" ")[0] for trigger in split_triggers(metadata.trigger)]
    return bool(tokens) and not any(contains_token(prompt, token) for token in tokens)


@check_arguments()
def generate_images(
    components: Components,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    adapters: Sequence[str | None] | None = None,
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
    require_finite: bool = False,
) -> list[Image.Image]:
    """Sample one image per seed, with whatever adapters are on, or each with its own.

    Each image has a generator of its own on the CPU, so that a seed gives the same image
    alone, in a batch (up to float rounding) and on another device.

    Args:
        components: The loaded model; its modules' train or eval mode is restored.
        prompt: What to show; or one prompt per seed, which may differ within a batch.
        seeds: One per image.
        settings: Steps, guidance, size, and what an inpainting model paints into.
        adapters: The name of each image's adapter, None for the base, as `load_adapter` or an
            `AdapterPool` named them: a batch shares the base's products, and the noise schedule.
        batch_size: Images at once.
        on_step: Called with (steps done, steps in all).
        require_finite: Refuse images that hold NaN, which becomes black, or are black all over.

    Raises:
        ValueError: If prompts or adapters are not one per seed, or the model lacks an adapter.
        ConfigError: If the model's pipeline lacks what the settings ask for.
        BrokenImageError: If an image is refused.

    Warns:
        UserWarning: Once for each prompt beyond the token limit, naming the text that was cut; and
            of each image in which the detail pass found nothing.
    """
    settings = settings or SamplingSettings()
    require_positive("batch_size", batch_size)
    prompt = _per_seed(prompt, seeds, adapters)
    _warn_of_prompts(components, prompt, settings, adapters)
    parts = 1 + len(seeds) * (settings.detail is not None)
    sample = partial(
        _sample_batches, components, batch_size=batch_size, require_finite=require_finite
    )
    images = sample(prompt, seeds, settings, adapters, _part(on_step, 0, parts))
    for number, seed in enumerate(seeds if settings.detail else ()):
        own = prompt if isinstance(prompt, str) else prompt[number]
        row = adapters and [adapters[number]]
        show = _part(on_step, number + 1, parts)
        images[number] = _with_detail(
            components, sample, images[number], own, seed, settings, row, show
        )
    return images


def _with_detail(
    components: Components,
    sample: Callable[..., list[Image.Image]],
    image: Image.Image,
    prompt: str,
    seed: int,
    settings: SamplingSettings,
    adapter: Sequence[str | None] | None,
    on_step: Callable[[int, int], None] | None,
) -> Image.Image:
    """An image after its detail pass; as it is where nothing is found."""
    detail = settings.detail
    assert detail is not None
    region = find_region(image, detail, components.default_resolution)
    if region is None:
        warnings.warn(
            f"no {detail.label or 'subject'} was found in the image of seed {seed}; {NO_PASS}",
            stacklevel=3,
        )
        return image
    closer = replace(
        settings, image=region.crop(image), mask_image=region.mask, width=region.size[0],
        height=region.size[1], denoise=detail.denoise, hires=None, detail=None,
    )  # fmt: skip
    text = detail.prompt or prompt
    # Text encoders may be adapted too: a row needs its own prompt.
    (painted,) = sample([text] if adapter else text, [seed], closer, adapter, on_step)
    return region.put_back(painted, image)


def _part(
    on_step: Callable[[int, int], None] | None, number: int, parts: int
) -> Callable[[int, int], None] | None:
    """Return what shows the steps of one of several parts of a work."""
    if on_step is None:
        return None
    show = on_step
    return lambda done, steps: show(number * steps + done, parts * steps)


def _sample_batches(
    components: Components,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    adapters: Sequence[str | None] | None,
    on_step: Callable[[int, int], None] | None,
    *,
    batch_size: int,
    require_finite: bool,
) -> list[Image.Image]:
    """The images of `generate_images`, without a detail pass."""
    images: list[Image.Image] = []
    batches = [slice(i, i + batch_size) for i in range(0, len(seeds), batch_size)]
    with _sampling(components, settings, is_mixed=bool(adapters)) as set_share:
        passes = _passes(components, settings)
        for done, (batch, turn) in enumerate(product(batches, passes)):
            pipeline, current = turn
            if turn is passes[0]:
                made: list[Image.Image] = []
            set_share(0.0)
            report = _reporter(on_step, set_share, done, len(batches) * len(passes))
            wanted = prompt if isinstance(prompt, str) else list(prompt[batch])
            rows = adapters and adapters[batch]
            with _norms_kept(components, rows) if rows else nullcontext():
                pixels = _sample(
                    pipeline, components, wanted, seeds[batch], current, report, rows, made
                )
            if require_finite:
                _require_finite(pixels, seeds[batch])
            made = pipeline.image_processor.numpy_to_pil(np.nan_to_num(pixels))
            images += made if turn is passes[-1] else []
    return images


@contextmanager
def _sampling(
    components: Components, settings: SamplingSettings, *, is_mixed: bool
) -> Iterator[Callable[[float], None]]:
    """Open the scopes of all batches. Yields what `scheduled` does.

    Raises:
        ValueError: If rows that name their adapters are to have schedules too.
    """
    if is_mixed and settings.strength_schedules:
        raise ValueError("strength schedules are of adapters that are on for all images")
    with (
        components.eval_mode(),
        torch.no_grad(),
        nullcontext() if is_mixed else _norms_kept(components),
        _autoencoder_as_loaded(components.vae),
        _any_channels(components) if settings.mask_image else nullcontext(),
        quiet_libraries(),
        scheduled(components.adaptable(), settings.strength_schedules) as set_share,
    ):
        yield set_share


def _passes(
    components: Components, settings: SamplingSettings
) -> list[tuple[Any, SamplingSettings]]:
    """The pipelines that make an image one after the other, each with its settings.

    Raises:
        ConfigError: If an inpainting model is to do without a mask.
    """
    inpaints, task = bool(components.family.image_arguments), ""
    lacks = settings.image is not None and settings.mask_image is None
    require(
        not (inpaints and (lacks or settings.hires)),
        f"{components.name} is an inpainting model, which paints into an image by a mask; give "
        "image and mask_image (white where to paint), and no hires",
        "image",
    )
    if settings.image is not None and not inpaints:
        task = "Image2Image" if lacks else "Inpainting"
    passes = [(components.pipeline(settings.scheduler, task), settings)]
    if settings.hires:
        height, width = (
            int(side * settings.hires) // PIXELS * PIXELS for side in _size(components, settings)
        )
        second = replace(
            settings, width=width, height=height, denoise=settings.hires_denoise, hires=None,
            steps=settings.hires_steps or settings.steps,
        )  # fmt: skip
        passes += [(components.pipeline(settings.scheduler, "Image2Image"), second)]
    return passes


def _warn_of_prompts(
    components: Components,
    prompt: str | Sequence[str],
    settings: SamplingSettings,
    adapters: Sequence[str | None] | None,
) -> None:
    """Warn of what of the prompts is not read."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts += [settings.negative_prompt] * len(adapters or "1")
    own = [*(adapters or ()), *(adapters or ())]
    if settings.detail is not None and settings.detail.prompt:
        prompts, own = [*prompts, settings.detail.prompt], [*own, None]
    if settings.prompt_weights:
        for text in dict.fromkeys(prompts):
            for kind in unread_syntax(text):
                message = f"syntax of web UIs is read as text here ({kind}): {quoted(text)}"
                warnings.warn(message, stacklevel=3)
        pairs = [
            (part, name) for text, name in zip_longest(prompts, own) for part in plain_parts(text)
        ]
        prompts, own = [part for part, _ in pairs], [name for _, name in pairs]
    warn_of_truncation(components, prompts, own)


def _per_seed(
    prompt: str | Sequence[str], seeds: Sequence[int], adapters: Sequence[str | None] | None
) -> str | Sequence[str]:
    """The prompt or prompts, as many as there are seeds where each has an adapter of its own."""
    if not isinstance(prompt, str) and len(prompt) != len(seeds):
        raise ValueError(f"{len(prompt)} prompts for {len(seeds)} seeds")
    if adapters is None:
        return prompt
    if len(adapters) != len(seeds):
        raise ValueError(f"{len(adapters)} adapters for {len(seeds)} seeds")
    # Text encoders may be adapted too: every image has a row of its own in their batch.
    return [prompt] * len(seeds) if isinstance(prompt, str) else prompt


def _norms_kept(
    components: Components, rows: Sequence[str | None] | None = None
) -> AbstractContextManager[None]:
    """Keep every norm, computed once where its model is: no parameter changes while sampling."""
    models = components.adaptable().values()
    scope: Callable[..., AbstractContextManager[None]] = norm_scope
    if rows:
        require_adapters(models, rows)
        scope = partial(row_scope, rows=rows, partly=True, cache=components.norms)
    if components.offload_to is not None:
        return in_turns(components, components.offload_to, scope)
    return scope(*models)


def _painted(
    components: Components,
    settings: SamplingSettings,
    count: int,
    enlarged: Sequence[Image.Image],
) -> dict[str, Any]:
    """Return the pipeline's arguments to paint over or into images; none without any.

    Args:
        components: The model.
        settings: With the image and the mask.
        count: Images of the batch.
        enlarged: Those of the first pass, to be painted over at the size of this one.
    """
    image, mask, inpaints = settings.image, settings.mask_image, components.family.image_arguments
    size, options = _size(components, settings), dict[str, Any]()
    if enlarged:
        larger = [each.resize(size[::-1], Image.Resampling.LANCZOS) for each in enlarged]
        return {"image": larger, "strength": settings.denoise}
    if image is None:
        if not inpaints:
            return {}
        image, mask = Image.new("RGB", size[::-1]), Image.new("L", size[::-1], 255)
        options = {"strength": 1.0}
    elif settings.denoise is not None or not inpaints:
        options = {"strength": DENOISE if settings.denoise is None else settings.denoise}
    crop = plan_crop((image.height, image.width), size, multiple=components.vae_factor)
    if mask is not None:
        options["mask_image"] = [cut(mask.convert("L"), crop)] * count
    return {"image": [cut(image.convert("RGB"), crop)] * count, **options}


def sampled_size(components: Components, settings: SamplingSettings) -> tuple[int, int]:
    """Width and height of an image's first pass, in pixels."""
    height, width = _size(components, settings)
    return width, height


def _size(components: Components, settings: SamplingSettings) -> tuple[int, int]:
    """Height and width that are sampled."""
    side = components.default_resolution
    return settings.height or side, settings.width or side


@contextmanager
def _autoencoder_as_loaded(vae: Any) -> Iterator[None]:
    """Decode each image of a batch by itself: a decoder takes far more memory than the UNet.

    Its dtype stays: pipelines that encode would round one that overflows to the UNet's.
    """
    slices, upcasts = vae.use_slicing, vae.config.force_upcast
    vae.use_slicing = True
    vae.register_to_config(force_upcast=False)
    try:
        yield
    finally:
        vae.use_slicing = slices
        vae.register_to_config(force_upcast=upcasts)


@contextmanager
def _any_channels(components: Components) -> Iterator[None]:
    """Have Diffusers' inpainting pipelines take latents of any number of channels.

    They know a UNet that is no inpainting model by its 4, and compute with the autoencoder's.
    """
    unet, channels = components.unet, components.unet.config.in_channels
    if not components.family.image_arguments:
        unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


def _sample(
    pipeline: Any,
    components: Components,
    prompt: str | list[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    report: Callable[..., dict[str, Any]],
    adapters: Sequence[str | None] | None,
    enlarged: Sequence[Image.Image],
) -> np.ndarray:
    """Pixels ``(B, H, W, 3)`` in [0, 1], or NaN."""
    painted = _painted(components, settings, len(seeds), enlarged)
    known = inspect.signature(pipeline.__call__).parameters
    if "height" in known:  # Of the others, the image has a size.
        painted["height"], painted["width"] = _size(components, settings)
    if "image" in painted and isinstance(prompt, str):
        # Each image of a batch draws its own latents of what it is painted into.
        prompt = [prompt] * len(seeds)
    if settings.guidance_rescale:
        name = "guidance_rescale"
        require(
            name in known,
            f"{name} is not in Diffusers' pipeline of {components.family.title}; leave it out",
            name,
        )
        painted[name] = settings.guidance_rescale
    pixels: np.ndarray = pipeline(
        **_prompts(components, prompt, settings, len(seeds), adapters),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=report,
        output_type="np",
        **painted,
    ).images
    return pixels


def _prompts(
    components: Components,
    prompt: str | list[str],
    settings: SamplingSettings,
    count: int,
    adapters: Sequence[str | None] | None,
) -> dict[str, Any]:
    """Return the pipeline's arguments for ``count`` images: prompts as they are, or encoded.

    Encoded are those that it would cut, those with weights or with an adapter's own tokens, and
    with clip skip, for which Diffusers' pipelines need a `text_model` that Transformers 5 has not.
    """
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    negative = settings.negative_prompt
    is_weighted = settings.prompt_weights and any(map(has_weights, [*prompts, negative]))
    is_short = components.most_chunks == 1 or all(
        chunk_count(components, text) == 1 for text in dict.fromkeys([*prompts, negative])
    )
    has_own = have_own_words(components, adapters or ())
    if is_short and not (components.clip_skip or has_own or is_weighted):
        negatives: Any = negative or None
        if negative and not isinstance(prompt, str):
            negatives = [negative] * count
        return {
            "prompt": prompt,
            "negative_prompt": negatives,
            "num_images_per_prompt": count if isinstance(prompt, str) else 1,
        }
    encode = encode_weighted if is_weighted else encode_prompts
    against = (
        encode_negative(components, [negative] * count, adapters, weighted=is_weighted)
        if negative
        else encode_unconditional(components, count)
    )
    both = Conditioning.cat([encode(components, prompts, adapters=adapters), against])
    parts = {"prompt_embeds": both.encoder_hidden_states, "pooled_prompt_embeds": both.pooled}
    return {
        prefix + name: rows
        for name, tensor in parts.items()
        if tensor is not None
        for prefix, rows in (("", tensor[:count]), ("negative_", tensor[count:]))
    }


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


def _reporter(
    on_step: Callable[[int, int], None] | None,
    set_share: Callable[[float], None],
    batch: int,
    batches: int,
) -> Callable[..., dict[str, Any]]:
    def report(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # Some samplers take more steps than they are asked for.
        steps = pipeline.num_timesteps
        set_share((step + 1) / steps)
        if on_step is not None:
            on_step(batch * steps + step + 1, batches * steps)
        return tensors

    return report
