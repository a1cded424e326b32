"""Components of a loaded model, and pipelines built from them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dora_diffusion.adapters.scope import NormCache
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import DENOISERS, FLOW, TITLES, Family
from dora_diffusion.config.fields import TOKENS_PER_CHUNK, require, require_token_length
from dora_diffusion.config.schedulers import SCHEDULERS, SamplingScheduler, to_zero_snr
from dora_diffusion.formats.checkpoint.schedule import NoiseSchedule, ScheduleInfo
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import FamilyCode, find_class, load_code
from dora_diffusion.models.words import write_out_words
from dora_diffusion.numerics.process import Diffusion, Flow


@dataclass(frozen=True)
class Components:
    """Modules of one model, frozen and in evaluation mode after loading.

    Attributes:
        family: Properties of the model family.
        denoiser: Module that predicts noise or velocity, such as a UNet2DConditionModel.
        vae: AutoencoderKL, in float32 if the family's autoencoder overflows in half precision.
        text_encoders: One text encoder, or the two of SDXL.
        tokenizers: Tokenizers of the text encoders.
        scheduler: DDPMScheduler with the noise schedule of the model, for training.
        name: Name that the model was loaded by.
        asked: Requested model, with its loading options.
        scheduler_config: Scheduler configuration of the model, with ``_class_name``, for sampling.
        zeros_for_empty_prompt: Whether guidance without a negative prompt uses zeros (SDXL).
        source: Folder or file of the weights.
        schedule: Noise schedule of the model, with the source of this information.
        stated: Noise schedules that the model states and that are usual for its kind.
        norms: Cache of adapter norms across batches; None: each batch computes them.
        offload_to: Compute device of offloaded modules (`models.offload`); None: not offloaded.
        clip_skip: Number of last layers of the text encoders to skip, as in Diffusers.
        max_token_length: Number of tokens of a prompt that are encoded, in chunks of 75; 0: all.
    """

    family: Family
    denoiser: Any
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
        """Check that the components belong together."""
        channels, latents = self.denoiser.config.in_channels, self.vae.config.latent_channels
        if channels != self.family.in_channels(latents):
            raise ValueError(
                f"{self.name}: the {DENOISERS[self.family.denoiser]} has {channels} input channels "
                f"but the VAE has {latents} latent channels; use a base model of {TITLES} with its "
                "own VAE"
            )
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            check_vocabulary(tokenizer, encoder, self.name)
            layers = encoder.config.num_hidden_layers - self.family.skipped_layers
            require(
                0 <= self.clip_skip < layers,
                f"clip_skip is {self.clip_skip}, but the text encoders of the model have {layers} "
                f"usable layers; choose 0 to {layers - 1}",
                "clip_skip",
            )
        require_token_length(self.max_token_length)

    def reading(
        self, clip_skip: int | None, max_token_length: int | None, *, is_told: bool = True
    ) -> Components:
        """Return the model with other prompt settings. None keeps a setting.

        Args:
            clip_skip: Number of last layers of the text encoders to skip.
            max_token_length: Number of tokens of a prompt that are encoded.
            is_told: Whether to warn of unusual values.

        Raises:
            ConfigError: If the model does not support a value.

        Warns:
            UserWarning: If the family already skips a layer.
        """
        family = self.family
        ignored = family.without_effect
        clip_skip = None if "clip_skip" in ignored else clip_skip
        max_token_length = None if "max_token_length" in ignored else max_token_length
        if clip_skip and family.skipped_layers and is_told:
            web = family.web_ui_clip_skip(0)
            warnings.warn(
                f"clip_skip is {clip_skip}: {family.title} uses the penultimate layer by default, "
                f"which web UIs call Clip skip {web}; this setting is Clip skip "
                f"{family.web_ui_clip_skip(clip_skip)} there",
                stacklevel=3,
            )
        skip = self.clip_skip if clip_skip is None else clip_skip
        length = self.max_token_length if max_token_length is None else max_token_length
        return replace(self, clip_skip=skip, max_token_length=length)

    @property
    def code(self) -> FamilyCode:
        """Functions of the family."""
        return load_code(self.family.code)

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        time_ids: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prediction of noise or velocity ``(B, C, h, w)`` (`FamilyCode.predict`)."""
        return self.code.predict(self, noisy_latents, timesteps, conditioning, time_ids, condition)

    @property
    def clip_skip_parameter(self) -> dict[str, int]:
        """Clip skip for the parameters of an image, as web UIs count it; empty if it is 0."""
        skip = self.clip_skip
        return {"Clip skip": self.family.web_ui_clip_skip(skip)} if skip else {}

    @property
    def most_chunks(self) -> int | None:
        """Number of chunks of a prompt that are encoded; None: all."""
        return self.max_token_length // TOKENS_PER_CHUNK or None

    @property
    def prediction_type(self) -> str:
        """Prediction type of the denoiser: "epsilon", "v_prediction" or "flow_prediction"."""
        return FLOW if self.family.is_flow else str(self.scheduler.config.prediction_type)

    @property
    def process(self) -> Diffusion | Flow:
        """Noise process, on the compute device."""
        config = self.scheduler.config
        if self.family.is_flow:
            # The pipeline chooses a dynamic shift by the size of an image. Training has none.
            shift = 1.0 if config.use_dynamic_shifting else float(config.shift)
            return Flow(config.num_train_timesteps, shift)
        return Diffusion(self.scheduler.alphas_cumprod.to(self.device), self.prediction_type)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_step(self) -> int:
        """Number of pixels of which sides of images are multiples."""
        return self.vae_factor * self.family.patch

    @property
    def bucket_step(self) -> int:
        """Number of pixels of which sides of training images are multiples.

        A UNet halves the latents at each level but the first.
        """
        levels = len(self.denoiser.config.get("block_out_channels", (0,)))
        return self.size_step * int(2 ** (levels - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def default_resolution(self) -> int:
        """Default side of an image in pixels, by the configuration of UNet or autoencoder."""
        if self.family.has_unet:
            size, factor = self.denoiser.config.sample_size, self.vae_factor
        else:
            size, factor = self.vae.config.sample_size, 1
        if size is None:
            return self.family.default_resolution
        return int(size if isinstance(size, int) else max(size)) * factor

    @property
    def device(self) -> torch.device:
        """Compute device: the device of the denoiser, or the target device of offloaded modules."""
        if self.offload_to is not None:
            return self.offload_to
        weight: torch.Tensor = next(self.denoiser.parameters())
        return weight.device

    def adaptable(self) -> dict[str, nn.Module]:
        """Return the modules that can have adapters, by component name."""
        encoders = zip(self.family.text_encoder_names, self.text_encoders, strict=True)
        return {self.family.denoiser: self.denoiser, **dict(encoders)}

    def modules(self) -> dict[str, nn.Module]:
        """Return all modules by component name."""
        return {**self.adaptable(), "vae": self.vae}

    def to(self, device: torch.device | str) -> Components:
        """Move all modules to a device without changing dtypes. Returns self."""
        for module in self.modules().values():
            module.to(device)
        return self

    def sharing_weights(self) -> Components:
        """Copy the modules and tokenizers, sharing all weights.

        Adapters, hooks, training mode and added tokens are independent. No weight may be modified.
        """
        tensors = (tensor for module in self.modules().values() for tensor in _weights(module))
        return copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})

    @contextmanager
    def weights_of(self, other: Components) -> Iterator[None]:
        """Use the weights of another model of the same shape inside the block, without copying.

        Raises:
            ValueError: If the shapes differ.
        """
        from dora_diffusion.numerics.quantised import exchange

        pairs = [
            pair
            for name, module in self.modules().items()
            for pair in zip(_weights(module), _weights(other.modules()[name]), strict=True)
        ]
        if any(ours.shape != theirs.shape for ours, theirs in pairs):
            raise ValueError(f"{self.name} and {other.name} have different shapes")

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
        """Set all modules to evaluation mode inside the block, and restore their modes after it."""
        modules = [m for model in self.modules().values() for m in model.modules() if m.training]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module in modules:
                module.training = True

    def pipeline(self, scheduler: str | None = None, task: str = "") -> Any:
        """Build the pipeline of the family from these modules.

        Args:
            scheduler: A name of `SCHEDULERS`. Default: the model's scheduler.
            task: Suffix of Diffusers' ``AutoPipelineFor...``: ``"Image2Image"`` or
                ``"Inpainting"``. Default: `Family.pipeline_class`.

        Returns:
            The pipeline, without safety checker, watermark and progress bar. It shares the modules,
            so that training affects it immediately.
        """
        import diffusers

        options = self.family.pipeline_options(self.zeros_for_empty_prompt)
        pipeline = find_class(self.family.code, self.family.pipeline_class)(
            **self.modules(),
            **dict(zip(self.family.tokenizer_names, self.tokenizers, strict=True)),
            scheduler=self.sampling_scheduler(scheduler),
            **options,
        )
        # Some pipelines take images themselves.
        if task and "strength" not in inspect.signature(pipeline.__call__).parameters:
            # `from_pipe` copies the configuration, which does not have all options.
            auto = getattr(diffusers, f"AutoPipelineFor{task}")
            pipeline = auto.from_pipe(pipeline, **options)
        pipeline.set_progress_bar_config(disable=True)
        # The method of Diffusers finds multi-vector tokens only in lower case.
        pipeline.maybe_convert_prompt = lambda prompt, tokenizer: (
            write_out_words(tokenizer, prompt)
            if isinstance(prompt, str)
            else [write_out_words(tokenizer, text) for text in prompt]
        )
        return pipeline

    def sampling_scheduler(self, name: str | None = None) -> Any:
        """Build a scheduler for sampling with this model's noise schedule.

        Raises:
            ValueError: If the name is unknown, or the scheduler does not support the schedule.
        """
        import diffusers

        config = {**self.scheduler.config, **self.scheduler_config}
        if self.family.is_flow:
            reason = self.family.without_effect["scheduler"]
            require(name is None, f"{self.name} takes no scheduler: {reason}", "scheduler")
            return type(self.scheduler).from_config(config)
        own_class = str(config.pop("_class_name", "DDIMScheduler"))
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"unknown scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
        scheduler = SamplingScheduler(own_class, "") if name is None else SCHEDULERS[name]
        # Schedulers clip samples to [-1, 1] by default, which latents exceed. The released models
        # have a steps_offset of 1.
        config |= {"clip_sample": False, "steps_offset": 1, **scheduler.settings}
        config.setdefault("set_alpha_to_one", False)
        class_name = scheduler.class_name
        if config.get("rescale_betas_zero_snr"):
            moved = to_zero_snr({"_class_name": class_name})
            if name is not None and moved["_class_name"] != class_name:
                raise ValueError(
                    f"the scheduler {name} does not support this model's noise schedule, which "
                    "ends in pure noise; choose ddim, euler or dpm++"
                )
            class_name = moved.pop("_class_name")
            config |= moved
        return getattr(diffusers, class_name).from_config(config)

    def identity(self, *components: str) -> str:
        """Return a digest of configuration and weights, for caches keyed by content.

        Args:
            components: Names such as "vae". Default: all components.
        """
        modules = self.modules()
        digests = [fingerprint(modules[name]) for name in components or sorted(modules)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, except for vectors of trained words."""
    return [weight for name, weight in module.named_parameters() if not name.endswith(".rows")]


def fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Return a digest of a module's tensor names, shapes, dtypes and evenly sampled values.

    Sampling makes it fast for large models. It detects training, which changes nearly all weights.
    """
    digest = hashlib.sha256(str(_settings(module)).encode())
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        # Cast on the CPU, since Apple's GPUs do not support float64.
        values = flat[:: max(1, flat.numel() // samples)].cpu().double()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """Return the configuration of a module without paths and library versions."""
    config: Any = getattr(module, "config", {})
    items = config.items() if isinstance(config, Mapping) else config.to_dict().items()
    ignored = ("transformers_version", "torch_dtype", "dtype", "architectures")
    return sorted((k, str(v)) for k, v in items if not k.startswith("_") and k not in ignored)


def check_vocabulary(tokenizer: Any, encoder: Any, name: str) -> None:
    """Check that a tokenizer fits its text encoder.

    A tokenizer folder without its vocabulary loads silently, with two or three tokens.

    Raises:
        ValueError: If token ids exceed the embedding, or most of the embedding is unreachable.
    """
    table = encoder.get_input_embeddings()
    tokens, rows = len(tokenizer), len(table.weight) + len(getattr(table, "rows", ()))
    if tokens > rows or tokens < rows // 2:
        raise ValueError(
            f"{name}: the tokenizer has {tokens} tokens but the text encoder has {rows}; "
            "its vocabulary files (vocab.json, merges.txt or tokenizer.json) are missing or wrong"
        )


def cast_to_weight(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast floating-point inputs to the dtype of the module (forward pre-hook).

    The SDXL pipeline passes latents in the dtype of the UNet, which may differ from the dtype of
    the autoencoder.
    """
    dtype = next(module.parameters()).dtype
    return tuple(
        value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for value in inputs
    )
