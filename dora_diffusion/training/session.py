"""A run's parts, put together: accelerator, model, adapters, data, optimizer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dora_diffusion.adapters.inject import (
    InjectionReport,
    adapter_parameters,
    inject_adapters,
    norm_scope,
)
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.derived import resolve
from dora_diffusion.data.batch import Batch
from dora_diffusion.data.buckets import Buckets
from dora_diffusion.data.captions import require_token
from dora_diffusion.data.checks import too_few
from dora_diffusion.data.dataset import DreamBoothDataset, iterate_batches
from dora_diffusion.data.draws import Draws
from dora_diffusion.data.masks import warn_of_unused_masks
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.data.sampler import EpochSampler, generator_for
from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.models.components import Components
from dora_diffusion.models.latents import encode_moments
from dora_diffusion.models.load import load_components
from dora_diffusion.models.precision import PRECISION_DTYPES, precision_of
from dora_diffusion.numerics.precision import allow_tf32
from dora_diffusion.training.events import OnEvent, ignore
from dora_diffusion.training.metrics import total_norm
from dora_diffusion.training.optimizer import (
    build_lr_schedule,
    build_optimizer,
    learning_rates,
    parameter_groups,
)
from dora_diffusion.training.prior import check_image_free, class_prompts, ensure_class_images
from dora_diffusion.training.step import Objective, draw_inputs
from dora_diffusion.training.subject import Subject
from dora_diffusion.wording import counted

# Crops per photo where they are drawn: the latents of all of them fit in memory.
_CROP_VARIANTS = 8


def make_accelerator(config: TrainConfig) -> Any:
    """The accelerator, which knows devices, processes and precision.

    Raises:
        ConfigError: If the precision is not possible here.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision fp16 needs a CUDA GPU; use bf16 or no")
    if config.report_to and find_spec(config.report_to) is None:
        raise ConfigError(
            f"report_to {config.report_to} needs a package that is not installed; "
            f"run 'pip install {config.report_to}'"
        )
    # A process may train more than once, with another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    if config.allow_tf32:
        allow_tf32()
    # SDXL never uses the last layer of its first text encoder.
    handler = DistributedDataParallelKwargs(
        find_unused_parameters=config.train_text_encoder, broadcast_buffers=False
    )
    return Accelerator(
        mixed_precision=precision_of(config.mixed_precision),
        log_with=config.report_to,
        project_dir=str(Path(config.output_dir, config.logging_dir)),
        # The other processes wait while the first one makes class images.
        kwargs_handlers=[handler, InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


@dataclass
class Session:
    """Everything that a training step needs."""

    config: TrainConfig
    subject: Subject
    accelerator: Any
    components: Components
    resolution: int
    total_steps: int
    trained: dict[str, nn.Module]
    report: InjectionReport
    dataset: DreamBoothDataset
    sampler: EpochSampler
    model: nn.Module
    optimizer: Any
    lr_schedule: Any
    _batches: Iterator[Batch] | None = field(default=None, repr=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        return [p for model in self.trained.values() for p in adapter_parameters(model)]

    def next_batch(self) -> Batch:
        """This process's next batch."""
        if self._batches is None:
            workers = 0 if self.dataset.caches_moments else self.config.dataloader_num_workers
            self._batches = iterate_batches(self.dataset, self.sampler, num_workers=workers)
        return next(self._batches)

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimizer step, number ``step`` from 1. Returns its numbers, still on the device."""
        # Only dropout draws from the global generator. Seeding it anew makes resuming exact.
        process = self.accelerator.process_index
        torch.manual_seed(generator_for("step", self.config.seed, step, process).initial_seed())
        accumulation = self.config.gradient_accumulation_steps
        losses = []
        # No parameter changes inside: every norm is computed once for all that happens here.
        with norm_scope(*self.trained.values()):
            for i in range(accumulation):
                last = i == accumulation - 1
                sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
                with sync:
                    micro_step = (step - 1) * accumulation + i
                    loss = self._backward(micro_step, 1 / accumulation)
                losses.append(loss)
        norm = self._clip()
        rates = learning_rates(self.optimizer.param_groups)
        self.optimizer.step()
        self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean")
        record = {"step": step, "loss": means[0], "grad_norm": norm, **rates}
        return record | ({"prior_loss": means[1]} if self.config.with_prior_preservation else {})

    def _backward(self, micro_step: int, share: float) -> Tensor:
        """Loss and gradients of one batch: ``(total, prior)``, detached."""
        config, batch = self.config, self.next_batch()
        photos = len(batch) - int(batch.is_prior.sum())
        image_free = (
            config.with_prior_preservation and config.prior_preservation_mode == "image-free"
        )
        inputs = draw_inputs(
            self.components,
            batch,
            seed=config.seed,
            micro_step=micro_step,
            first_row=self.accelerator.process_index * photos,
            noise_offset=config.noise_offset,
            class_captions=[self.subject.class_caption(c) for c in batch.captions]
            if image_free
            else None,
        )
        with self.accelerator.autocast():
            subject_loss, prior_loss = self.model(inputs)
        loss = subject_loss + config.prior_loss_weight * prior_loss
        self.accelerator.backward(loss * share)
        return torch.stack([loss.detach(), prior_loss.detach()])

    def _clip(self) -> Tensor:
        limit = self.config.max_grad_norm
        if limit:
            norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, limit)
            return norm
        self.accelerator.unscale_gradients()
        return total_norm(self.parameters)


def open_session(
    config: TrainConfig, subject: Subject, accelerator: Any, on_event: OnEvent = ignore
) -> Session:
    """Load the model, put the adapter on, and make the data and the optimizer.

    Args:
        config: All settings.
        subject: Token and class word.
        accelerator: What `make_accelerator` made.
        on_event: Called with ``{"event": "class_images", ...}`` while those are generated.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: With what to do.
    """
    precision = precision_of(config.mixed_precision, accelerator.device)
    dtype = PRECISION_DTYPES[precision]
    # Before the model is loaded, which takes longer.
    paths = list_photos(config.instance_data_dir or "")
    components = load_components(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
        dtype=dtype,
        config=config.model_config,
    ).to(accelerator.device)
    resolution = config.resolution or components.default_resolution
    dataset = _dataset(config, subject, components, resolution, paths, accelerator, on_event)
    trained, report = _inject(components, config)
    sampler = EpochSampler(
        len(dataset),
        batch_size=config.train_batch_size,
        seed=config.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        groups=dataset.groups if config.aspect_ratio_buckets else None,
    )
    total_steps = _total_steps(config, components, sampler)
    config = resolve(
        config,
        resolution=resolution,
        total_steps=total_steps,
        steps_per_epoch=-(-sampler.batches_per_epoch // config.gradient_accumulation_steps),
        mixed_precision=precision,
    )
    _warn_of_length_and_layers(config, report)
    optimizer = accelerator.prepare_optimizer(
        build_optimizer(parameter_groups(trained, config), config)
    )
    objective: nn.Module = Objective(
        components, train_text_encoder=config.train_text_encoder, snr_gamma=config.snr_gamma
    ).to(accelerator.device)
    if accelerator.num_processes > 1:
        objective = accelerator.prepare_model(objective)
    return Session(
        config,
        subject,
        accelerator,
        components,
        resolution,
        total_steps,
        trained,
        report,
        dataset,
        sampler,
        objective,
        optimizer,
        build_lr_schedule(optimizer.optimizer, config, total_steps),
    )


def _warn_of_length_and_layers(config: TrainConfig, report: InjectionReport) -> None:
    """Say what only shows once the number of steps and the adapted layers are known."""
    steps = config.max_train_steps or 0
    if config.lr_warmup_steps >= steps:
        warnings.warn(
            f"lr_warmup_steps is {config.lr_warmup_steps}, and the run has "
            f"{counted(steps, 'step')}: the learning rate never reaches {config.learning_rate:g}; "
            "make the warm-up shorter",
            stacklevel=4,
        )
    has_conv = any("Conv" in layer.kind for layer in report.layers)
    moved = {
        "conv_rank": config.conv_rank != TrainConfig().conv_rank,
        "conv_alpha": config.conv_alpha != config.conv_rank,
    }
    for name in (name for name in moved if moved[name] and not has_conv):
        warnings.warn(f"{name} has no effect because targets name no Conv2d layer", stacklevel=4)


def _total_steps(config: TrainConfig, components: Components, sampler: EpochSampler) -> int:
    if config.max_train_steps is not None:
        return config.max_train_steps
    if config.num_train_epochs is not None:
        batches = config.num_train_epochs * sampler.batches_per_epoch
        return max(1, -(-batches // config.gradient_accumulation_steps))
    return components.family.default_steps


def _inject(
    components: Components, config: TrainConfig
) -> tuple[dict[str, nn.Module], InjectionReport]:
    """Put the adapters on the components that train."""
    trained, layers = {}, []
    for name, model in components.adaptable().items():
        if name != "unet" and not config.train_text_encoder:
            continue
        adapter = config.unet_adapter if name == "unet" else config.text_encoder_adapter
        generator = generator_for("adapter", config.seed, name)
        layers += inject_adapters(model, adapter, generator=generator).layers
        trained[name] = model
        model.train()
        if config.gradient_checkpointing:
            _checkpoint_gradients(model)
    return trained, InjectionReport(tuple(layers))


def _checkpoint_gradients(model: Any) -> None:
    if hasattr(model, "gradient_checkpointing_enable"):
        # The reentrant form needs an input that requires a gradient, and a prompt has none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()


def _dataset(
    config: TrainConfig,
    subject: Subject,
    components: Components,
    resolution: int,
    paths: Sequence[Path],
    accelerator: Any,
    on_event: OnEvent,
) -> DreamBoothDataset:
    """The photos, with class images beside them where prior preservation wants them."""
    draws = Draws(
        resolution,
        seed=config.seed,
        multiple=components.vae_factor,
        buckets=_buckets(config, components, resolution),
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        crop_variants=_CROP_VARIANTS if config.cache_latents else None,
        caption_dropout=config.caption_dropout,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
    )
    photos = read_photos(
        paths,
        config.instance_prompt or "",
        skip_unreadable=True,
        mask_crops=draws.first_crops if config.masked_loss else None,
    )
    captions = [photo.caption for photo in photos]
    if subject.token:
        require_token(captions, subject.token)
    if message := too_few(len(photos)):
        warnings.warn(message, stacklevel=2)
    if config.is_image_free:
        check_image_free(subject, captions)
    if not config.masked_loss:
        warn_of_unused_masks(photos)
    class_images: list[Photo] = []
    if config.with_prior_preservation and config.prior_preservation_mode == "images":
        class_images = _class_images(
            config, subject, components, resolution, captions, accelerator, on_event
        )
    dataset = DreamBoothDataset(photos, draws, class_images)
    if config.cache_latents:

        def encode(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                return encode_moments(components.vae, pixels)

        dataset.cache_moments(encode)
    return dataset


def _buckets(config: TrainConfig, components: Components, resolution: int) -> Buckets | None:
    """Crop sizes, with sides that the UNet can halve at each of its levels."""
    if not config.aspect_ratio_buckets:
        return None
    levels = len(components.unet.config.block_out_channels) - 1
    return Buckets(resolution, step=components.vae_factor * 2**levels)


def _class_images(
    config: TrainConfig,
    subject: Subject,
    components: Components,
    resolution: int,
    captions: Sequence[str],
    accelerator: Any,
    on_event: OnEvent,
) -> list[Photo]:
    """Class images from the base model: the adapters are not on it yet."""
    prompts = class_prompts(config, subject, captions)
    settings = SamplingSettings(
        steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        width=resolution,
        height=resolution,
    )

    def generate(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        return generate_images(
            components,
            prompt,
            seeds,
            settings,
            batch_size=config.sample_batch_size,
            require_finite=True,
        )

    def show(done: int, total: int) -> None:
        on_event({"event": "class_images", "done": done, "total": total})

    folder = Path(config.class_data_dir or Path(config.output_dir) / "class_images")
    # The first process makes what is missing; the others then find it there.
    with accelerator.main_process_first():
        paths = ensure_class_images(
            folder,
            prompts,
            count=config.num_class_images,
            seed=config.seed,
            identity=f"{components.identity()} {settings}",
            generate=generate,
            batch_size=config.sample_batch_size,
            on_image=show,
        )
    return read_photos(paths, prompts[0], skip_unreadable=True)
