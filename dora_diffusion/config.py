"""Every setting of an adapter and of a training run, in one place, checked when it is made.

The fields of `TrainConfig` are the flags of ``train_dreambooth_dora.py`` and the keys of its YAML
config files. Flags that users know from Diffusers' scripts keep their names and meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESETS = ("cross-attention", "attention", "attention+conv", "full")
TEXT_ENCODER_PRESETS = ("text-encoder-attention", "text-encoder")
NORM_AXES = ("output", "input")
PRIOR_MODES = ("images", "image-free")
PRECISIONS = ("no", "fp16", "bf16")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
LR_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


class ConfigError(ValueError):
    """A setting has a value that cannot work. The message names the setting and its value."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(name: str, value: float | None) -> None:
    _require(value is None or value > 0, f"{name} is {value}; it must be greater than 0")


def _not_negative(name: str, value: float | None) -> None:
    _require(value is None or value >= 0, f"{name} is {value}; it must not be negative")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is {value!r}; it must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is made of.

    Attributes:
        targets: Preset names (`PRESETS`, `TEXT_ENCODER_PRESETS`) or glob patterns of module paths.
        rank: r of Linear layers.
        alpha: The scale is ``alpha / rank``. None means ``alpha = rank``.
        conv_rank: r of Conv2d layers. None means ``rank``.
        conv_alpha: None means ``conv_alpha = conv_rank``.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732).
        use_dora: Train a magnitude. False gives plain LoRA.
        norm_axis: ``"output"`` (one magnitude per output channel, as PEFT has it) or ``"input"``
            (one per input channel, as the paper prints it).
        dropout: Probability of dropping an input of the low-rank path.

    Example:
        >>> AdapterConfig(rank=8).conv_rank_or_rank
        8

    Raises:
        ConfigError: If a value cannot work.
    """

    targets: tuple[str, ...] = ("attention+conv",)
    rank: int = 8
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    rslora: bool = False
    use_dora: bool = True
    norm_axis: str = "output"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        _require(bool(self.targets), "targets is empty; name a preset or a pattern of module paths")
        for name in ("rank", "alpha", "conv_rank", "conv_alpha"):
            _positive(name, getattr(self, name))
        _one_of("norm_axis", self.norm_axis, NORM_AXES)
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def conv_rank_or_rank(self) -> int:
        """The rank that Conv2d layers get."""
        return self.rank if self.conv_rank is None else self.conv_rank

    def rank_and_alpha(self, is_conv: bool) -> tuple[int, float]:
        """Rank and effective alpha (the scale is always ``alpha / rank``) of a kind of layer."""
        rank = self.conv_rank_or_rank if is_conv else self.rank
        alpha = self.conv_alpha if is_conv else self.alpha
        alpha = float(rank if alpha is None else alpha)
        return rank, alpha * rank**0.5 if self.rslora else alpha


def _flag(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field that carries its help text for the command line."""
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one DreamBooth run.

    Example:
        >>> TrainConfig(instance_data_dir="photos", instance_prompt="a photo of a sks dog").rank
        8

    Raises:
        ConfigError: If a value cannot work, or two values contradict each other.
    """

    # The model
    pretrained_model_name_or_path: str = _flag(
        "embedded:tiny-sd",
        "Diffusers folder, hub id, single-file .safetensors checkpoint, or embedded:NAME.",
    )
    pretrained_vae_model_name_or_path: str | None = _flag(
        None, "Another VAE: folder or hub id (for SDXL in fp16, one that is fp16-safe)."
    )
    model_config: str | None = _flag(
        None,
        "For a single-file checkpoint: a Diffusers folder with its configuration and tokenizers. "
        "Default: the released model's, from the hub.",
    )
    revision: str | None = _flag(None, "Revision of the model on the hub.")
    variant: str | None = _flag(None, "Variant of the weight files, such as fp16.")

    # The subject
    instance_data_dir: str | None = _flag(
        None, "Folder of subject photos, with optional .txt captions."
    )
    instance_prompt: str | None = _flag(
        None, 'Caption of photos that have none, with the token: "a photo of a sks dog".'
    )
    token: str = _flag(
        "sks",
        "The word that will mean the subject. Every caption must contain it; '' turns that off.",
    )
    class_word: str | None = _flag(
        None,
        "What the subject is. Default: the words that follow the token in the instance prompt.",
    )
    resolution: int | None = _flag(
        None, "Training size in pixels. Default: what the model was made for."
    )
    center_crop: bool = _flag(False, "Crop the middle instead of drawing a crop in every epoch.")
    random_flip: bool = _flag(
        False, "Mirror half of the photos; not for subjects with text or a side."
    )
    aspect_ratio_buckets: bool = _flag(
        False, "Crop each photo to a shape near its own instead of a square of the same area."
    )
    masked_loss: bool = _flag(
        False, "Learn only where NAME.mask.png beside a photo, or its alpha channel, is bright."
    )
    shuffle_tags: bool = _flag(False, "Shuffle the comma-separated tags of captions.")
    keep_tags: int = _flag(1, "Tags at a caption's start that --shuffle_tags leaves in place.")
    caption_dropout: float = _flag(0.0, "Share of captions replaced by the empty prompt.")

    # Prior preservation
    with_prior_preservation: bool = _flag(False, "Keep other members of the class as they are.")
    prior_preservation_mode: str = _flag(
        "images",
        "images: train on pictures of the class too, generated where there are none. image-free: "
        "hold the adapted model's answer to the class caption at the base model's.",
        choices=PRIOR_MODES,
    )
    class_data_dir: str | None = _flag(
        None,
        "Folder of class images; missing ones are generated. Default: OUTPUT_DIR/class_images.",
    )
    class_prompt: str | None = _flag(
        None, "Caption of class images. Default: each photo's caption with the token taken out."
    )
    num_class_images: int = _flag(100, "How many class images to have.")
    prior_loss_weight: float = _flag(1.0, "Weight of the prior-preservation loss.")
    sample_batch_size: int = _flag(4, "Class images generated at once.")

    # The adapter
    targets: list[str] = _flag(
        ["attention+conv"], f"UNet layers to adapt: {', '.join(PRESETS)}, or glob patterns."
    )
    text_encoder_targets: list[str] = _flag(
        ["text-encoder-attention"],
        f"Text-encoder layers to adapt: {', '.join(TEXT_ENCODER_PRESETS)}, or glob patterns.",
    )
    train_text_encoder: bool = _flag(False, "Adapt the text encoders too.")
    rank: int = _flag(8, "Rank of Linear layers.")
    lora_alpha: float | None = _flag(None, "Alpha of Linear layers. Default: rank.")
    conv_rank: int = _flag(4, "Rank of Conv2d layers.")
    conv_alpha: float | None = _flag(None, "Alpha of Conv2d layers. Default: conv_rank.")
    rslora: bool = _flag(False, "Scale by alpha / sqrt(rank).")
    lora_dropout: float = _flag(0.0, "Dropout on the low-rank path.")
    use_dora: bool = _flag(True, "Train DoRA's magnitude; --no-use_dora trains plain LoRA.")
    norm_axis: str = _flag(
        "output",
        "output: one magnitude per output channel, as PEFT and Diffusers have it. input: one per "
        "input channel, which ComfyUI, Forge and A1111 compute exactly.",
        choices=NORM_AXES,
    )

    # The optimisation
    max_train_steps: int | None = _flag(None, "Optimizer steps. Default: 800, for SDXL 1000.")
    num_train_epochs: int | None = _flag(None, "Epochs instead of max_train_steps.")
    train_batch_size: int = _flag(1, "Photos per step and process.")
    gradient_accumulation_steps: int = _flag(1, "Batches per optimizer step.")
    learning_rate: float = _flag(8e-5, "Learning rate of the UNet's adapter.")
    text_encoder_lr: float = _flag(
        5e-6, "Learning rate of the text encoders' adapter; prodigy takes learning_rate for all."
    )
    magnitude_lr: float | None = _flag(None, "Learning rate of magnitudes. Default: their layer's.")
    loraplus_ratio: float = _flag(
        1.0, "Learning rate of B over that of A (LoRA+, arXiv:2402.12354)."
    )
    lr_scheduler: str = _flag("constant", "Learning-rate schedule.", choices=LR_SCHEDULES)
    lr_warmup_steps: int = _flag(0, "Optimizer steps over which the rate rises from 0.")
    lr_num_cycles: int = _flag(1, "Cycles of cosine_with_restarts.")
    lr_power: float = _flag(1.0, "Power of the polynomial schedule.")
    optimizer: str = _flag("adamw", "Optimizer.", choices=OPTIMIZERS)
    use_8bit_adam: bool = _flag(False, "The same as --optimizer adamw8bit (needs bitsandbytes).")
    adam_beta1: float = _flag(0.9, "First moment's decay.")
    adam_beta2: float = _flag(0.999, "Second moment's decay.")
    adam_weight_decay: float = _flag(1e-4, "Weight decay of A and B; magnitudes never decay.")
    adam_epsilon: float = _flag(1e-8, "Epsilon of Adam.")
    max_grad_norm: float = _flag(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    snr_gamma: float = _flag(5.0, "min-SNR loss weighting (arXiv:2303.09556); 0 turns it off.")
    noise_offset: float = _flag(0.0, "Share of noise that is constant over each channel.")
    mixed_precision: str = _flag("no", "Precision of the frozen model.", choices=PRECISIONS)
    gradient_checkpointing: bool = _flag(False, "Less memory for a slower step.")
    allow_tf32: bool = _flag(False, "TensorFloat-32 on Ampere and later GPUs.")
    dataloader_num_workers: int = _flag(0, "Processes that prepare batches.")
    seed: int = _flag(0, "Seed of everything that is drawn.")

    # The result
    output_dir: str = _flag("dreambooth-output", "Where everything is written.")
    overwrite_output_dir: bool = _flag(
        False, "Replace an earlier result in output_dir, and drop its checkpoints."
    )
    validation_prompt: list[str] = _flag([], "Prompts of the sample pictures, each with the token.")
    num_validation_images: int = _flag(4, "Sample pictures per prompt.")
    validation_steps: int | None = _flag(
        None, "Sample every so many steps. Default: at the end only."
    )
    validation_inference_steps: int = _flag(25, "Denoising steps of a sample picture.")
    validation_guidance_scale: float = _flag(7.5, "Guidance of a sample picture.")
    checkpointing_steps: int = _flag(500, "Save a checkpoint every so many steps; 0 saves none.")
    checkpointing_minutes: float = _flag(5.0, "Save one in between every so many minutes; 0: none.")
    checkpoints_total_limit: int | None = _flag(None, "Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = _flag(
        None, "A checkpoint folder to go on from, or 'latest' in OUTPUT_DIR."
    )
    report_to: str | None = _flag(
        None, "Tracker: tensorboard, wandb.", choices=("tensorboard", "wandb")
    )

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _positive(name, getattr(self, name))
        for name in _NOT_NEGATIVE:
            _not_negative(name, getattr(self, name))
        for setting in dataclasses.fields(self):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices and value is not None:
                _one_of(setting.name, value, choices)
        _require(
            0 <= self.caption_dropout <= 1,
            f"caption_dropout is {self.caption_dropout}; it must be between 0 and 1",
        )
        if self.optimizer_name == "prodigy":
            self._check_prodigy()
        for targets, rank_only in ((self.targets, False), (self.text_encoder_targets, True)):
            self._adapter(tuple(targets), rank_only)

    def _check_prodigy(self) -> None:
        _require(
            self.learning_rate >= 0.1,
            f"learning_rate is {self.learning_rate}; Prodigy finds the rate itself, and multiplies "
            "it by learning_rate: use 1",
        )
        _require(
            self.magnitude_lr is None and self.loraplus_ratio == 1,
            "Prodigy has one rate for everything: leave out magnitude_lr and loraplus_ratio",
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

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as a YAML file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a config from plain values.

        Raises:
            ConfigError: If a key is not a setting, or a value has the wrong type.
        """
        known = {setting.name: setting for setting in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        _require(not unknown, f"unknown settings: {', '.join(unknown)}")
        return cls(**{name: _cast(known[name], value) for name, value in values.items()})


_POSITIVE = (
    "resolution", "num_class_images", "sample_batch_size", "rank", "lora_alpha", "conv_rank",
    "conv_alpha", "max_train_steps", "num_train_epochs", "train_batch_size", "lr_num_cycles",
    "gradient_accumulation_steps", "loraplus_ratio", "validation_steps", "checkpoints_total_limit",
    "validation_inference_steps", "adam_epsilon",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "text_encoder_lr", "magnitude_lr", "prior_loss_weight", "lr_warmup_steps",
    "adam_weight_decay", "max_grad_norm", "snr_gamma", "noise_offset", "num_validation_images",
    "dataloader_num_workers", "seed", "keep_tags", "checkpointing_steps", "lora_dropout",
)  # fmt: skip


def setting_type(setting: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a setting, and whether it is a list: ``list[str]`` -> ``(str, True)``."""
    name = str(setting.type).removesuffix(" | None")
    is_list = name.startswith("list[")
    return _TYPES[name.removeprefix("list[").removesuffix("]")], is_list


_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def _cast(setting: dataclasses.Field[Any], value: Any) -> Any:
    """A value from YAML in the type of its setting; YAML reads ``1e-4`` as a string."""
    kind, is_list = setting_type(setting)
    if value is None:
        return None
    if is_list:
        return [kind(item) for item in (value if isinstance(value, list | tuple) else [value])]
    if kind is bool or isinstance(value, bool):
        wanted = "true or false" if kind is bool else kind.__name__
        _require(
            kind is bool and isinstance(value, bool),
            f"{setting.name} is {value!r}; it must be {wanted}",
        )
        return value
    try:
        cast = kind(value)
    except (TypeError, ValueError):
        cast = None
    _require(
        cast is not None and not (kind is int and isinstance(value, float) and value != cast),
        f"{setting.name} is {value!r}; it must be of type {kind.__name__}",
    )
    return cast


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Relative paths in it are meant from the working directory.

    Raises:
        ConfigError: If the file is missing, is not YAML, or does not hold a mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    _require(isinstance(values, dict), f"{path} must hold 'setting: value' lines")
    return dict(values)
