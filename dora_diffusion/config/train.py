"""Every setting of a training run, in one place, checked when it is made.

The fields of `TrainConfig` are the flags of ``train_dreambooth_dora.py`` and the keys of its YAML
config files. Flags that users know from Diffusers' scripts keep their names and meaning; those
that are not here are answered in `dora_diffusion.config.flag_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dora_diffusion.config.adapter import NORM_AXES, PRESETS, TEXT_ENCODER_PRESETS, AdapterConfig
from dora_diffusion.config.checks import require
from dora_diffusion.config.fields import AnyOf, Need, Setting, flag
from dora_diffusion.wording import did_you_mean

PRIOR_MODES = ("images", "image-free")
PRECISIONS = ("auto", "no", "fp16", "bf16")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
LR_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)

# Headings of --help, in the order of the fields.
MODEL = "Base model"
SUBJECT = "Subject"
IMAGES = "Images and captions"
PRIOR = "Prior preservation"
ADAPTER = "Adapter"
LENGTH = "Length and batch"
OPTIMIZER = "Optimizer and learning rate"
LOSS = "Loss"
DEVICE = "Precision and memory"
SAMPLES = "Samples during and after training"
OUTPUT = "Output, checkpoints and resuming"

_PRIOR = Need("with_prior_preservation")
_CLASS_IMAGES = (_PRIOR, Need("prior_preservation_mode", ("images",)))
_TEXT_ENCODER = Need("train_text_encoder")
_SAMPLES = Need("num_validation_images")
_ADAM = Need("optimizer", ("adamw", "adamw8bit", "prodigy"))
_PRODIGY = Need("optimizer", ("prodigy",))


def _single_file(config: TrainConfig) -> str | None:
    is_file = config.pretrained_model_name_or_path.endswith(".safetensors")
    return None if is_file else "the base model is not a single .safetensors file"


def _on_the_hub(config: TrainConfig) -> str | None:
    name = config.pretrained_model_name_or_path
    is_local = name.startswith("embedded:") or Path(name).expanduser().exists()
    return "the base model is not from the hub" if is_local else None


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one DreamBooth run.

    Example:
        >>> TrainConfig(instance_data_dir="photos", instance_prompt="a photo of a sks dog").rank
        8

    Raises:
        ConfigError: If a value cannot work, or two values contradict each other.
    """

    pretrained_model_name_or_path: str = flag(
        MODEL,
        "embedded:tiny-sd",
        "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME.",
        derived="embedded:tiny-sd, a toy model that knows only its own drawn world",
        is_path=True,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        MODEL,
        None,
        "Another VAE: folder or hub id (for SDXL in fp16, one that is fp16-safe).",
        derived="the base model's",
        is_path=True,
    )
    model_config: str | None = flag(
        MODEL,
        None,
        "For a single-file checkpoint: a Diffusers folder with its configuration and tokenizers.",
        derived="the released model's, from the hub",
        needs=(_single_file,),
        is_path=True,
    )
    revision: str | None = flag(
        MODEL,
        None,
        "Branch, tag or commit of a base model on the hub.",
        derived="main",
        needs=(_on_the_hub,),
    )
    variant: str | None = flag(MODEL, None, "Variant of the weight files, such as fp16.")

    instance_data_dir: str | None = flag(
        SUBJECT,
        None,
        "Folder of images of the subject, with optional .txt captions; sub-folders are not read.",
        derived="none, required",
        resume="apart",  # its images are compared by content
        is_path=True,
    )
    instance_prompt: str | None = flag(
        SUBJECT,
        None,
        'Caption of images that have none, with the token: "a photo of a sks dog".',
        derived="none, required",
    )
    token: str = flag(
        SUBJECT,
        "sks",
        "The trigger word. The instance prompt must contain it; captions that lack it are warned "
        "of, and refused where all lack it. '' turns these checks off.",
    )
    class_word: str | None = flag(
        SUBJECT,
        None,
        "What the subject is.",
        derived="the words that follow the token in the instance prompt",
    )

    resolution: int | None = flag(
        IMAGES, None, "Training size in pixels.", derived="the base model's own", above=0
    )
    center_crop: bool = flag(
        IMAGES, False, "Crop the middle instead of drawing a crop in every epoch."
    )
    random_flip: bool = flag(
        IMAGES, False, "Mirror half of the images; not for subjects with text or a side."
    )
    aspect_ratio_buckets: bool = flag(
        IMAGES, False, "Crop each image to a shape near its own instead of a square."
    )
    masked_loss: bool = flag(
        IMAGES,
        False,
        "Take the loss only where NAME.mask.png beside an image, or its alpha channel, is bright.",
    )
    shuffle_tags: bool = flag(IMAGES, False, "Shuffle the comma-separated tags of captions.")
    keep_tags: int = flag(
        IMAGES,
        1,
        "Tags at a caption's start that --shuffle_tags leaves in place.",
        needs=(Need("shuffle_tags"),),
        least=0,
    )
    caption_dropout: float = flag(
        IMAGES,
        0.0,
        "Share of captions dropped: trained as what guidance uses without a negative prompt.",
        least=0,
        most=1,
    )
    cache_latents: bool = flag(
        IMAGES,
        True,
        "Encode up to 8 crops of each image once and keep their latents; off encodes a newly "
        "drawn crop at every step.",
    )
    dataloader_num_workers: int = flag(
        IMAGES,
        0,
        "Processes that load images; 0 loads in the main process.",
        needs=(Need("cache_latents", (False,)),),
        resume="apart",
        least=0,
    )

    with_prior_preservation: bool = flag(
        PRIOR, False, "Prior preservation: keep other members of the class as they are."
    )
    prior_preservation_mode: str = flag(
        PRIOR,
        "images",
        "images: train on class images too, generated where there are none. image-free: hold the "
        "adapted model's prediction for the class caption at the base model's.",
        choices=PRIOR_MODES,
        needs=(_PRIOR,),
    )
    class_data_dir: str | None = flag(
        PRIOR,
        None,
        "Folder of class images; missing ones are generated.",
        derived="OUTPUT_DIR/class_images",
        resume="apart",  # its images are compared by content
        needs=_CLASS_IMAGES,
        is_path=True,
    )
    class_prompt: str | None = flag(
        PRIOR,
        None,
        "Caption of class images.",
        derived="each image's caption with the token taken out",
        needs=_CLASS_IMAGES,
    )
    num_class_images: int = flag(
        PRIOR, 100, "How many class images to have.", needs=_CLASS_IMAGES, above=0
    )
    prior_loss_weight: float = flag(
        PRIOR, 1.0, "Weight of the prior-preservation loss.", needs=(_PRIOR,), least=0
    )
    sample_batch_size: int = flag(
        PRIOR, 4, "Class images generated at once.", needs=_CLASS_IMAGES, resume="apart", above=0
    )

    targets: list[str] = flag(
        ADAPTER,
        ["attention+conv"],
        f"UNet layers to adapt: {', '.join(PRESETS)}, or glob patterns of layer names.",
    )
    text_encoder_targets: list[str] = flag(
        ADAPTER,
        ["text-encoder-attention"],
        f"Text-encoder layers to adapt: {', '.join(TEXT_ENCODER_PRESETS)}, or glob patterns.",
        needs=(_TEXT_ENCODER,),
    )
    train_text_encoder: bool = flag(ADAPTER, False, "Adapt the text encoders too.")
    rank: int = flag(ADAPTER, 8, "Rank of Linear layers.", above=0)
    lora_alpha: float | None = flag(
        ADAPTER, None, "Alpha of Linear layers.", derived="rank", above=0
    )
    conv_rank: int = flag(ADAPTER, 4, "Rank of Conv2d layers.", above=0)
    conv_alpha: float | None = flag(
        ADAPTER, None, "Alpha of Conv2d layers.", derived="conv_rank", above=0
    )
    rslora: bool = flag(ADAPTER, False, "Scale by alpha / sqrt(rank).")
    lora_dropout: float = flag(ADAPTER, 0.0, "Dropout on the low-rank path.", least=0, below=1)
    use_dora: bool = flag(ADAPTER, True, "Train DoRA's magnitude; --no-use_dora trains plain LoRA.")
    norm_axis: str = flag(
        ADAPTER,
        "output",
        "output: one magnitude per output channel, as PEFT and Diffusers have it. input: one per "
        "input channel, whose file Diffusers cannot load, and ComfyUI, Forge and A1111 of today "
        "compute as it was trained (export is exact in every program).",
        choices=NORM_AXES,
        needs=(Need("use_dora"),),
    )

    max_train_steps: int | None = flag(
        LENGTH,
        None,
        "Optimizer steps.",
        derived="800, for SDXL 1000",
        resume="free",
        above=0,
    )
    num_train_epochs: int | None = flag(
        LENGTH,
        None,
        "Epochs instead of max_train_steps.",
        derived="as many as max_train_steps takes",
        resume="free",
        needs=(Need("max_train_steps", (None,)),),
        above=0,
    )
    train_batch_size: int = flag(LENGTH, 1, "Images per batch and process.", resume="free", above=0)
    gradient_accumulation_steps: int = flag(
        LENGTH, 1, "Batches per optimizer step.", resume="free", above=0
    )

    learning_rate: float = flag(
        OPTIMIZER, 8e-5, "Learning rate of the UNet's adapter.", resume="free", least=0
    )
    text_encoder_lr: float = flag(
        OPTIMIZER,
        5e-6,
        "Learning rate of the text encoders' adapter; prodigy takes learning_rate for all.",
        resume="free",
        needs=(_TEXT_ENCODER, Need("optimizer", ("adamw", "adamw8bit", "adafactor"))),
        least=0,
    )
    magnitude_lr: float | None = flag(
        OPTIMIZER,
        None,
        "Learning rate of magnitudes.",
        derived="their layer's",
        resume="free",
        needs=(Need("use_dora"),),
        least=0,
    )
    loraplus_ratio: float = flag(
        OPTIMIZER,
        1.0,
        "Learning rate of B over that of A (LoRA+, arXiv:2402.12354).",
        resume="free",
        above=0,
    )
    lr_scheduler: str = flag(
        OPTIMIZER,
        "constant",
        "Learning-rate schedule; constant with --lr_warmup_steps is constant_with_warmup.",
        choices=LR_SCHEDULES,
    )
    lr_warmup_steps: int = flag(
        OPTIMIZER, 0, "Optimizer steps over which the rate rises from 0.", least=0
    )
    lr_num_cycles: int = flag(
        OPTIMIZER,
        1,
        "Cycles of cosine_with_restarts.",
        needs=(Need("lr_scheduler", ("cosine_with_restarts",)),),
        above=0,
    )
    lr_power: float = flag(
        OPTIMIZER,
        1.0,
        "Power of the polynomial schedule.",
        needs=(Need("lr_scheduler", ("polynomial",)),),
    )
    optimizer: str = flag(OPTIMIZER, "adamw", "Optimizer.", choices=OPTIMIZERS)
    use_8bit_adam: bool = flag(
        OPTIMIZER, False, "The same as --optimizer adamw8bit (needs bitsandbytes)."
    )
    adam_beta1: float = flag(
        OPTIMIZER, 0.9, "First moment's decay.", resume="free", needs=(_ADAM,), least=0
    )
    adam_beta2: float = flag(
        OPTIMIZER, 0.999, "Second moment's decay.", resume="free", needs=(_ADAM,), least=0
    )
    adam_weight_decay: float = flag(
        OPTIMIZER,
        1e-4,
        "Weight decay of A and B; magnitudes never decay.",
        resume="free",
        least=0,
    )
    adam_weight_decay_text_encoder: float | None = flag(
        OPTIMIZER,
        None,
        "Weight decay of A and B in the text encoders.",
        derived="adam_weight_decay",
        resume="free",
        needs=(_TEXT_ENCODER,),
        least=0,
    )
    adam_epsilon: float = flag(
        OPTIMIZER, 1e-8, "Epsilon of Adam.", resume="free", needs=(_ADAM,), above=0
    )
    prodigy_beta3: float | None = flag(
        OPTIMIZER,
        None,
        "Decay of Prodigy's estimate of the step size.",
        derived="the square root of adam_beta2",
        needs=(_PRODIGY,),
        least=0,
    )
    prodigy_decouple: bool = flag(
        OPTIMIZER, True, "AdamW's decoupled weight decay in Prodigy.", needs=(_PRODIGY,)
    )
    prodigy_use_bias_correction: bool = flag(
        OPTIMIZER, False, "Adam's bias correction in Prodigy.", needs=(_PRODIGY,)
    )
    prodigy_safeguard_warmup: bool = flag(
        OPTIMIZER,
        True,
        "Leave the rate out of the denominator of Prodigy's estimate, for warm-ups.",
        needs=(_PRODIGY,),
    )
    max_grad_norm: float = flag(
        OPTIMIZER,
        1.0,
        "Gradients are clipped to this norm; 0 does not clip.",
        resume="free",
        least=0,
    )

    snr_gamma: float = flag(
        LOSS, 5.0, "min-SNR loss weighting (arXiv:2303.09556); 0 turns it off.", least=0
    )
    noise_offset: float = flag(
        LOSS, 0.0, "Share of noise that is constant over each channel.", least=0
    )

    mixed_precision: str = flag(
        DEVICE,
        "auto",
        "Precision of the frozen model. auto: what accelerate launch was given, else bf16 on a "
        "GPU that computes it and fp16 on others; float32 (no) on a CPU and on Apple's GPUs.",
        choices=PRECISIONS,
        resume="free",
    )
    gradient_checkpointing: bool = flag(
        DEVICE,
        False,
        "Recompute activations in the backward pass: less memory, slower.",
        resume="free",
    )
    allow_tf32: bool = flag(
        DEVICE, False, "TensorFloat-32 on Ampere and later GPUs.", resume="free"
    )
    seed: int = flag(DEVICE, 0, "Seed of everything that is drawn.", least=0)

    validation_prompt: list[str] = flag(
        SAMPLES,
        [],
        "Prompts of the samples: with the token for the subject, without it to watch how the "
        "class drifts.",
        derived="the instance prompt",
        resume="free",
        needs=(_SAMPLES,),
    )
    num_validation_images: int = flag(
        SAMPLES, 4, "Samples per prompt; 0 samples nothing.", resume="free", least=0
    )
    validation_steps: int | None = flag(
        SAMPLES,
        None,
        "Sample every so many steps.",
        derived="at the end only",
        resume="free",
        needs=(_SAMPLES,),
        above=0,
    )
    validation_epochs: int | None = flag(
        SAMPLES,
        None,
        "Sample every so many epochs instead of validation_steps.",
        derived="at the end only",
        resume="free",
        needs=(_SAMPLES, Need("validation_steps", (None,))),
        above=0,
    )
    validation_inference_steps: int = flag(
        SAMPLES,
        25,
        "Denoising steps of samples and class images.",
        resume="free",
        needs=(AnyOf((_SAMPLES, _PRIOR)),),
        above=0,
    )
    validation_guidance_scale: float = flag(
        SAMPLES,
        7.5,
        "Guidance scale of samples and class images.",
        resume="free",
        needs=(AnyOf((_SAMPLES, _PRIOR)),),
    )

    output_dir: str = flag(
        OUTPUT,
        "dreambooth-output",
        "Where everything is written.",
        resume="apart",
        is_path=True,
    )
    overwrite_output_dir: bool = flag(
        OUTPUT,
        False,
        "Replace an earlier result in output_dir, and drop its checkpoints.",
        resume="apart",
    )
    checkpointing_steps: int = flag(
        OUTPUT,
        500,
        "Save a checkpoint every so many steps and of the last one; 0 saves none, so that a "
        "finished run cannot be extended.",
        resume="apart",
        least=0,
    )
    checkpointing_minutes: float = flag(
        OUTPUT,
        5.0,
        "Save a checkpoint in between, too, every so many minutes; 0 saves none.",
        needs=(Need("checkpointing_steps"),),
        resume="apart",
        least=0,
    )
    checkpoints_total_limit: int | None = flag(
        OUTPUT, None, "Keep only the newest checkpoints.", derived="all", resume="apart", above=0
    )
    resume_from_checkpoint: str | None = flag(
        OUTPUT,
        None,
        "A checkpoint folder to resume from, or 'latest' in OUTPUT_DIR.",
        resume="apart",
        is_path=True,
    )
    report_to: str | None = flag(
        OUTPUT,
        None,
        "Tracker: tensorboard, wandb.",
        choices=("tensorboard", "wandb"),
        resume="apart",
    )
    logging_dir: str = flag(
        OUTPUT,
        "logs",
        "Folder of the tracker's files, in OUTPUT_DIR.",
        resume="apart",
        needs=(Need("report_to"),),
    )
    push_to_hub: bool = flag(
        OUTPUT,
        False,
        "Publish the result on the Hugging Face hub when training is done, privately.",
        resume="apart",
    )
    hub_model_id: str | None = flag(
        OUTPUT,
        None,
        "NAME/MODEL to publish as.",
        derived="none, required by --push_to_hub",
        resume="apart",
        needs=(Need("push_to_hub"),),
    )

    def __post_init__(self) -> None:
        for setting in settings():
            setting.check(getattr(self, setting.name))
        require(
            not (self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit")),
            f"use_8bit_adam is another optimizer than {self.optimizer}; leave one of them out",
            "use_8bit_adam",
        )
        require(
            not self.push_to_hub or "/" in (self.hub_model_id or ""),
            "push_to_hub needs --hub_model_id NAME/MODEL",
            "push_to_hub",
        )
        if self.optimizer_name == "prodigy":
            self._check_prodigy()
        for targets, rank_only in ((self.targets, False), (self.text_encoder_targets, True)):
            self._adapter(tuple(targets), rank_only)

    def _check_prodigy(self) -> None:
        require(
            self.learning_rate >= 0.1,
            f"learning_rate is {self.learning_rate}; Prodigy finds the rate itself, and multiplies "
            "it by learning_rate: use 1",
            "learning_rate",
        )
        require(
            self.magnitude_lr is None and self.loraplus_ratio == 1,
            "Prodigy has one rate for everything: leave out magnitude_lr and loraplus_ratio",
            "optimizer",
        )

    def _adapter(self, targets: tuple[str, ...], linear_only: bool) -> AdapterConfig:
        return AdapterConfig(
            targets=targets,
            rank=self.rank,
            alpha=self.lora_alpha,
            conv_rank=None if linear_only else self.conv_rank,
            conv_alpha=None if linear_only else self.conv_alpha,
            rslora=self.rslora,
            use_dora=self.use_dora,
            norm_axis=self.norm_axis,
            dropout=self.lora_dropout,
        )

    @property
    def unet_adapter(self) -> AdapterConfig:
        """The adapter of the UNet."""
        return self._adapter(tuple(self.targets), linear_only=False)

    @property
    def text_encoder_adapter(self) -> AdapterConfig:
        """The adapter of each text encoder."""
        return self._adapter(tuple(self.text_encoder_targets), linear_only=True)

    @property
    def optimizer_name(self) -> str:
        """The optimizer, with ``use_8bit_adam`` taken into account."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def lr_schedule(self) -> str:
        """The schedule; Diffusers' plain ``constant`` would leave a warm-up out."""
        with_warmup = self.lr_scheduler == "constant" and self.lr_warmup_steps > 0
        return "constant_with_warmup" if with_warmup else self.lr_scheduler

    @property
    def is_image_free(self) -> bool:
        """Whether the prior is held without class images."""
        return self.with_prior_preservation and self.prior_preservation_mode == "image-free"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as a YAML file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a config from plain values.

        Raises:
            ConfigError: If a key is not a setting, or a value has the wrong type.
        """
        known = {setting.name: setting for setting in settings()}
        unknown = [f"{name}{did_you_mean(name, known)}" for name in values if name not in known]
        require(not unknown, f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**{name: known[name].cast(value) for name, value in values.items()})


@lru_cache(maxsize=1)
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of their fields."""
    return tuple(Setting.from_field(source) for source in dataclasses.fields(TrainConfig))
