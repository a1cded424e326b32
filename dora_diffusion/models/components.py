"""A loaded model: its modules, what the family says of them, and pipelines built from them."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dora_diffusion.adapters.scope import NormCache
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import TITLES, Family
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, require, require_token_length
from dora_diffusion.formats.checkpoint.schedule import NoiseSchedule, ScheduleInfo
from dora_diffusion.models.schedulers import SCHEDULERS, SamplingScheduler, to_zero_snr
from dora_diffusion.models.words import write_out_words
from dora_diffusion.numerics.process import Diffusion


@dataclass(frozen=True)
class Components:
    """The modules of one model, frozen and in evaluation mode as loaded.

    Attributes:
        family: Properties of the model's family.
        unet: The UNet2DConditionModel.
        vae: The AutoencoderKL; float32 where the family's overflows in half precision.
        text_encoders: One encoder, or SDXL's two.
        tokenizers: Their tokenizers.
        scheduler: DDPMScheduler with the model's noise schedule, for training.
        name: The name the model was loaded by.
        asked: What was loaded, with what was asked of how it is read.
        scheduler_config: The model's own scheduler settings, with ``_class_name``, for sampling.
        zeros_for_empty_prompt: Guidance without a negative prompt uses zeros (SDXL).
        source: Folder or file that the weights were read from.
        schedule: How its noise schedule is meant, and who says so.
        stated: What the model says of that itself, and what is usual of its kind.
        norms: What keeps the norms of adapters that rows of a batch name from one batch to the
            next; None: each batch computes them.
        offload_to: Where modules compute that lie in the host's memory until then
            (`models.offload`); None: they compute where they are.
        clip_skip: Last layers of the text encoders that prompts are read without, as Diffusers'
            pipelines count them.
        max_token_length: Tokens of a prompt that are read, in chunks of 75; 0 reads all.
    """

    family: Family
    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    name: str = ""
    asked: BaseModel | None = None
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    zeros_for_empty_prompt: bool = False
    source: str = ""
    schedule: NoiseSchedule | None = None
    stated: tuple[Sequence[ScheduleInfo], Sequence[ScheduleInfo]] = ((), ())
    norms: NormCache | None = None
    offload_to: torch.device | None = None
    clip_skip: int = 0
    max_token_length: int = TOKENS_PER_CHUNK

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        channels, latents = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != self.family.in_channels(latents):
            raise ValueError(
                f"{self.name}: the UNet reads {channels} channels but the VAE makes {latents}; use "
                f"a base model of {TITLES}, and its own VAE"
            )
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            check_vocabulary(tokenizer, encoder, self.name)
            layers = encoder.config.num_hidden_layers - self.family.skipped_layers
            require(
                0 <= self.clip_skip < layers,
                f"clip_skip is {self.clip_skip}; the model's text encoders have {layers} layers to "
                f"read, so it must be 0 to {layers - 1}",
                "clip_skip",
            )
        require_token_length(self.max_token_length)

    def reading(
        self, clip_skip: int | None, max_token_length: int | None, *, is_told: bool = True
    ) -> Components:
        """The model, with how it is to read prompts; None leaves it as it is.

        Args:
            clip_skip: Last layers of the text encoders to leave out.
            max_token_length: Tokens of a prompt that are read.
            is_told: Warn of what is unusual.

        Raises:
            ConfigError: If it cannot.

        Warns:
            UserWarning: Of a clip skip on top of one that the family has.
        """
        family = self.family
        if clip_skip and family.skipped_layers and is_told:
            web = family.web_ui_clip_skip(0)
            warnings.warn(
                f"clip_skip is {clip_skip}: {family.title} without it reads the penultimate layer "
                f"already, which web UIs call Clip skip {web}; this is their "
                f"{family.web_ui_clip_skip(clip_skip)}",
                stacklevel=3,
            )
        skip = self.clip_skip if clip_skip is None else clip_skip
        length = self.max_token_length if max_token_length is None else max_token_length
        return replace(self, clip_skip=skip, max_token_length=length)

    @property
    def clip_skip_parameter(self) -> dict[str, int]:
        """Clip skip in an image's parameters, as web UIs count it; empty without one."""
        skip = self.clip_skip
        return {"Clip skip": self.family.web_ui_clip_skip(skip)} if skip else {}

    @property
    def most_chunks(self) -> int | None:
        """Chunks of a prompt that are read; None: all."""
        return self.max_token_length // TOKENS_PER_CHUNK or None

    @property
    def prediction_type(self) -> str:
        """Prediction type of the UNet: "epsilon" or "v_prediction"."""
        return str(self.scheduler.config.prediction_type)

    @property
    def process(self) -> Diffusion:
        """The noise process, on the compute device."""
        return Diffusion(self.scheduler.alphas_cumprod.to(self.device), self.prediction_type)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def default_resolution(self) -> int:
        """Side in pixels that this model was trained at, by its own configuration."""
        size = self.unet.config.sample_size
        if size is None:
            return self.family.default_resolution
        return int(size if isinstance(size, int) else max(size)) * self.vae_factor

    @property
    def device(self) -> torch.device:
        """Compute device: the UNet's, or that to which modules are brought."""
        if self.offload_to is not None:
            return self.offload_to
        weight: torch.Tensor = next(self.unet.parameters())
        return weight.device

    def adaptable(self) -> dict[str, nn.Module]:
        """The modules that adapters may be injected into, by component name."""
        encoders = zip(self.family.text_encoder_names, self.text_encoders, strict=True)
        return {"unet": self.unet, **dict(encoders)}

    def modules(self) -> dict[str, nn.Module]:
        """Every module by component name."""
        return {**self.adaptable(), "vae": self.vae}

    def to(self, device: torch.device | str) -> Components:
        """Move every module to a device, dtypes unchanged; returns itself."""
        for module in self.modules().values():
            module.to(device)
        return self

    def sharing_weights(self) -> Components:
        """The same model in modules and tokenizers of its own, over the same tensors.

        Adapters, hooks, modes and tokens of one are not the other's. No weight may be written to.
        """
        tensors = (tensor for module in self.modules().values() for tensor in _weights(module))
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})

    @contextmanager
    def weights_of(self, other: Components) -> Iterator[None]:
        """The weights of another model of the same kind inside the block; nothing is copied.

        Raises:
            ValueError: If their modules differ.
        """
        from dora_diffusion.numerics.quantised import exchange

        pairs = [
            pair
            for name, module in self.modules().items()
            for pair in zip(_weights(module), _weights(other.modules()[name]), strict=True)
        ]
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            raise ValueError(f"{self.name} and {other.name} are models of different shapes")

        def swap() -> None:
            for ours, theirs in pairs:
                exchange(ours, theirs)

        swap()
        try:
            yield
        finally:
            swap()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Every module in evaluation mode inside the block, and as it was after it."""
        trains = [
            part for module in self.modules().values() for part in module.modules() if part.training
        ]
        for part in trains:
            part.training = False
        try:
            yield
        finally:
            for part in trains:
                part.training = True

    def pipeline(self, scheduler: str | None = None, task: str = "") -> Any:
        """Build the family's pipeline from these same modules.

        Args:
            scheduler: A name of `SCHEDULERS`; None is the model's own.
            task: What Diffusers' ``AutoPipelineFor...`` makes of it: ``"Image2Image"`` or
                ``"Inpainting"``; empty is the family's own.

        Returns:
            `Family.pipeline_class`, or that of the task, without a safety checker or watermark, its
            progress bar off. It shares the modules: what is trained shows at once.
        """
        import diffusers

        options = self.family.pipeline_options(self.zeros_for_empty_prompt)
        pipeline = getattr(diffusers, self.family.pipeline_class)(
            **self.modules(),
            **dict(zip(self.family.tokenizer_names, self.tokenizers, strict=True)),
            scheduler=self.sampling_scheduler(scheduler),
            **options,
        )
        if task:
            # With the options again: not all of them are in the configuration that it copies.
            auto = getattr(diffusers, f"AutoPipelineFor{task}")
            pipeline = auto.from_pipe(pipeline, **options)
        pipeline.set_progress_bar_config(disable=True)
        # Diffusers' own finds words of several vectors in lower case only.
        pipeline.maybe_convert_prompt = lambda prompt, tokenizer: (
            write_out_words(tokenizer, prompt)
            if isinstance(prompt, str)
            else [write_out_words(tokenizer, text) for text in prompt]
        )
        return pipeline

    def sampling_scheduler(self, name: str | None = None) -> Any:
        """Build a scheduler to sample with, over this model's noise schedule.

        Raises:
            ValueError: If the name is not known, or that one cannot follow the schedule.
        """
        import diffusers

        config = {**self.scheduler.config, **self.scheduler_config}
        own_class = str(config.pop("_class_name", "DDIMScheduler"))
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"unknown scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
        chosen = SamplingScheduler(own_class, "") if name is None else SCHEDULERS[name]
        # Latents are not confined to [-1, 1]; a scheduler's default clips them, and the first
        # schedule step of the released models is offset by one.
        config |= {"clip_sample": False, "steps_offset": 1, **chosen.settings}
        config.setdefault("set_alpha_to_one", False)
        class_name = chosen.class_name
        if config.get("rescale_betas_zero_snr"):
            moved = to_zero_snr({"_class_name": class_name})
            if name is not None and moved["_class_name"] != class_name:
                raise ValueError(
                    f"the scheduler {name} cannot follow this model's noise schedule, which ends "
                    "in pure noise; choose ddim, euler or dpm++"
                )
            class_name = moved.pop("_class_name")
            config |= moved
        return getattr(diffusers, class_name).from_config(config)

    def identity(self, *components: str) -> str:
        """Digest of the named components' configuration and weights, for caches keyed by content.

        Args:
            components: For example "vae"; none means all.
        """
        modules = self.modules()
        parts = [fingerprint(modules[name]) for name in components or sorted(modules)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters without the vectors of trained words, which not every model has."""
    return [weight for name, weight in module.named_parameters() if not name.endswith(".rows")]


def fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Digest of a module's tensor names, shapes, dtypes and evenly sampled values.

    Sampling keeps it fast on large models; any training step changes practically every weight.
    """
    digest = hashlib.sha256(str(_settings(module)).encode())
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        # Cast on the CPU: Apple's GPUs have no float64, not even on the way.
        chosen = flat[:: max(1, flat.numel() // samples)].cpu().double()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """A module's configuration without names of places and versions of libraries."""
    config: Any = getattr(module, "config", {})
    items = config.items() if isinstance(config, Mapping) else config.to_dict().items()
    passing = ("transformers_version", "torch_dtype", "dtype", "architectures")
    return sorted((k, str(v)) for k, v in items if not k.startswith("_") and k not in passing)


def check_vocabulary(tokenizer: Any, encoder: Any, name: str) -> None:
    """Refuse a tokenizer that cannot belong to its text encoder.

    A tokenizer folder without its vocabulary loads silently with two or three tokens.

    Raises:
        ValueError: If token ids exceed the embedding, or most of the embedding is unreachable.
    """
    table = encoder.get_input_embeddings()
    tokens, rows = len(tokenizer), len(table.weight) + len(getattr(table, "rows", ()))
    if tokens > rows or tokens < rows // 2:
        raise ValueError(
            f"{name}: the tokenizer knows {tokens} tokens but the text encoder has {rows}; "
            "its vocabulary files (vocab.json, merges.txt or tokenizer.json) are missing or wrong"
        )


def cast_to_weight(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: cast a floating-point input to the module's own dtype.

    A float32 autoencoder beside a half-precision UNet needs it: SDXL's pipeline passes latents on
    in the UNet's dtype.
    """
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for value in inputs
    )
