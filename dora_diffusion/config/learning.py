"""Settings of training: adapter, length, optimizer, loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from dora_diffusion.config.adapter import (
    INITS,
    NORM_AXES,
    PRESETS,
    TEXT_ENCODER_PRESETS,
)
from dora_diffusion.config.features.average import SCHEDULE_FREE
from dora_diffusion.config.fields import Condition, Need, TextOrPath, flag, free_flag

PRODIGIES = ("prodigy", "prodigy-schedule-free")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", *SCHEDULE_FREE)
LR_SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip

_TEXT_ENCODER = Need("train_text_encoder")
_ADAPTER = Need("method", ("dora", "lora"))
_ADAM = Need("optimizer", tuple(name for name in OPTIMIZERS if name != "adafactor"))
_RANKED = Need("parametrization", ("low-rank", "adalora"))
_VERA = Need("parametrization", ("vera",))
_PRODIGY = Need("optimizer", ("prodigy",))


_MAGNITUDES = (Need("method", ("dora",)), Need("use_dora"))

_adapter_flag = partial(flag, needs=(_ADAPTER,))
_ranked_flag = partial(flag, needs=(_ADAPTER, _RANKED))
_adam_flag = partial(free_flag, needs=(_ADAM,))
_prodigy_flag = partial(flag, needs=(_PRODIGY,))


def _rate(setting: str, untrained: str) -> Condition:
    """Condition that a learning rate is above 0, unless magnitudes or patterns have their own."""

    def reason(config: OptimizerSettings) -> str | None:
        is_zero = getattr(config, setting) == 0
        is_zero = is_zero and not config.magnitude_lr and not any(config.lr_pattern.values())
        return f"it is 0: {untrained} is trained" if is_zero else None

    return reason


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Trained weights: an adapter, or the weights of the model itself."""

    heading: ClassVar = "Adapter"

    method: str = flag(
        None,
        "Training method. dora: low-rank matrices and magnitudes; weights are frozen. lora: the "
        "matrices alone.",
        derived="dora",
        choices=("dora", "lora"),
    )
    init_adapter: TextOrPath[str | None] = _adapter_flag(
        None,
        "Adapter to start from: a file, the folder of a run, or a hub id, in any key format, of "
        "this rank or a smaller one. A LoRA can start a DoRA. Its scale is kept if no alpha is "
        "given.",
        is_path=True,
    )
    targets: list[str] = _adapter_flag(
        ["attention+conv"],
        f"Denoiser layers to adapt: {', '.join(PRESETS)}, or glob patterns of layer names.",
    )
    text_encoder_targets: list[str] = flag(
        ["text-encoder-attention"],
        f"Text-encoder layers to adapt: {', '.join(TEXT_ENCODER_PRESETS)}, or glob patterns.",
        needs=(_TEXT_ENCODER, _ADAPTER),
    )
    train_text_encoder: bool = flag(False, "Train the text encoders too.")
    rank: int = _ranked_flag(8, "Rank of Linear layers.", above=0)
    lora_alpha: float | None = _ranked_flag(
        None, "Alpha of Linear layers.", derived="rank, or init_adapter's", above=0
    )
    conv_rank: int = _ranked_flag(4, "Rank of Conv2d layers.", above=0)
    conv_alpha: float | None = _ranked_flag(
        None, "Alpha of Conv2d layers.", derived="conv_rank, or init_adapter's", above=0
    )
    rank_pattern: dict[str, int] = _ranked_flag(
        {},
        "Rank of layers by pattern (a preset, a glob pattern, or the end of a name after a dot), "
        "such as 'mid_block.*=16 to_k=4'. The first pattern that matches applies.",
        above=0,
    )
    alpha_pattern: dict[str, float] = _ranked_flag(
        {},
        "Alpha of layers by pattern, as in rank_pattern; other layers have lora_alpha or "
        "conv_alpha, whatever their rank.",
        above=0,
    )
    rslora: bool = _ranked_flag(False, "rsLoRA: scale by alpha / sqrt(rank).")
    parametrization: str = _adapter_flag(
        "low-rank",
        "Form of the update. low-rank: trainable A and B. vera: frozen random A and B shared by "
        "all layers, and two trainable vectors per layer (VeRA, arXiv:2310.11454; with magnitudes "
        "DVoRA); needs 10 to 100 times the learning rate.",
        choices=("low-rank", "vera"),
    )
    vera_rank: int = flag(64, "Rank of VeRA's projections.", needs=(_ADAPTER, _VERA), above=0)
    init: str = _adapter_flag(
        "random",
        "Initialization of A and B. random: A random, B zero. pissa: leading singular vectors of "
        "the weight (PiSSA, arXiv:2404.02948); the file has twice the rank.",
        choices=INITS,
    )
    lora_dropout: float = _adapter_flag(
        0.0,
        "Dropout on the low-rank path. Above 0, a step stores more activations, except with "
        "gradient_checkpointing.",
        least=0,
        below=1,
    )
    use_dora: bool = _adapter_flag(
        True, "Train DoRA's magnitude; --no-use_dora is the same as --method lora."
    )
    norm_axis: str = flag(
        "output",
        "output: one magnitude per output channel, as in PEFT and Diffusers. input: one per "
        "input channel: exact in ComfyUI, Forge and A1111 without conversion, but Diffusers "
        "cannot load the file.",
        choices=NORM_AXES,
        needs=_MAGNITUDES,
    )


@dataclass(frozen=True, kw_only=True)
class LengthSettings:
    """Length of training and batch size."""

    heading: ClassVar = "Optimization"

    max_train_steps: int | None = free_flag(
        None, "Optimizer steps.", derived="800; SDXL and flows 1000", above=0, ends_run=True
    )
    num_train_epochs: int | None = free_flag(
        None,
        "Epochs instead of max_train_steps.",
        derived="as many as max_train_steps needs",
        needs=(Need("max_train_steps", (None,)),),
        above=0,
    )
    train_batch_size: int = free_flag(1, "Per-device batch size.", above=0)
    gradient_accumulation_steps: int = free_flag(
        1, "Gradient accumulation: batches per optimizer step.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer."""

    heading: ClassVar = "Optimization"

    learning_rate: float | None = free_flag(
        None,
        "Learning rate of the denoiser.",
        derived="8e-5, for flow models 1e-4",
        needs=(_rate("learning_rate", "nothing of the denoiser"),),
        least=0,
    )
    text_encoder_lr: float = free_flag(
        5e-6,
        "Learning rate of the text encoders; prodigy takes learning_rate for all.",
        needs=(
            _TEXT_ENCODER,
            Need("optimizer", tuple(name for name in OPTIMIZERS if name not in PRODIGIES)),
            _rate("text_encoder_lr", "no text encoder"),
        ),
        least=0,
    )
    magnitude_lr: float | None = free_flag(
        None, "Learning rate of magnitudes.", derived="their layer's", needs=_MAGNITUDES, least=0
    )
    lr_pattern: dict[str, float] = _adapter_flag(
        {}, "Learning rate of layers by pattern, as in rank_pattern; 0 freezes them.", least=0
    )
    loraplus_ratio: float = _adapter_flag(
        1.0, "Learning rate of B over that of A (LoRA+, arXiv:2402.12354).", resume="free", above=0
    )
    lr_scheduler: str = flag(
        "constant",
        "Learning-rate schedule; constant with --lr_warmup_steps is constant_with_warmup.",
        choices=LR_SCHEDULES,
    )
    lr_warmup_steps: int = flag(0, "Learning-rate warm-up, in optimizer steps.", least=0)
    lr_num_cycles: int = flag(
        1,
        "Cycles of the cosine_with_restarts schedule.",
        needs=(Need("lr_scheduler", ("cosine_with_restarts",)),),
        above=0,
    )
    lr_power: float = flag(
        1.0,
        "Power of the polynomial schedule.",
        needs=(Need("lr_scheduler", ("polynomial",)),),
        least=0,
    )
    optimizer: str = flag(
        "adamw",
        "Optimizer. adamw8bit needs bitsandbytes. schedule-free: an average of the weights "
        "replaces the schedule (arXiv:2405.15682); samples, validation and files use the average.",
        choices=OPTIMIZERS,
    )
    adam_beta1: float = _adam_flag(0.9, "Adam's beta1: decay of the first moment.", least=0)
    adam_beta2: float = _adam_flag(0.999, "Adam's beta2: decay of the second moment.", least=0)
    adam_weight_decay: float = free_flag(
        1e-4, "Weight decay of A and B, or of the weights; magnitudes never decay.", least=0
    )
    adam_weight_decay_text_encoder: float | None = free_flag(
        None,
        "Weight decay in the text encoders.",
        derived="adam_weight_decay",
        needs=(_TEXT_ENCODER,),
        least=0,
    )
    adam_epsilon: float = _adam_flag(1e-8, "Adam's epsilon.", above=0)
    prodigy_beta3: float | None = flag(
        None,
        "Decay of Prodigy's estimate of the step size.",
        derived="the square root of adam_beta2",
        needs=(Need("optimizer", PRODIGIES),),
        least=0,
    )
    prodigy_decouple: bool = _prodigy_flag(True, "AdamW's decoupled weight decay in Prodigy.")
    prodigy_use_bias_correction: bool = _prodigy_flag(False, "Adam's bias correction in Prodigy.")
    prodigy_safeguard_warmup: bool = _prodigy_flag(
        True, "Exclude the learning rate from the denominator of Prodigy's estimate, for warm-ups."
    )
    max_grad_norm: float = free_flag(1.0, "Gradient clipping norm; 0 does not clip.", least=0)


LOSS_TYPES = ("l2", "huber")
HUBER_SCHEDULES = ("snr", "exponential", "constant")
TIMESTEP_DISTRIBUTIONS = ("uniform", "logit_normal", "power")
_HUBER = Need("loss_type", ("huber",))
_LOGIT_NORMAL = Need("timestep_distribution", ("logit_normal",))


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss."""

    heading: ClassVar = "Optimization"

    snr_gamma: float | None = flag(
        None,
        "Gamma of min-SNR loss weighting (arXiv:2303.09556); 0 turns it off.",
        derived="5 if the model predicts the noise, 0 if it predicts v or velocity",
        least=0,
    )
    loss_type: str = flag(
        "l2",
        "Loss function. l2: mean squared error. huber: pseudo-Huber, less sensitive to large "
        "errors, for photos with flaws (arXiv:2403.16728); computed as in sd-scripts.",
        choices=LOSS_TYPES,
    )
    huber_schedule: str = flag(
        "snr",
        "Delta of the Huber loss by timestep. constant: huber_c. exponential and snr: from 1 "
        "without noise to huber_c in pure noise.",
        choices=HUBER_SCHEDULES,
        needs=(_HUBER,),
    )
    huber_c: float = flag(
        0.1,
        "Delta of the Huber loss; with another schedule than constant, delta in pure noise.",
        needs=(_HUBER,),
        above=0,
    )
    noise_offset: float = flag(
        0.0, "Noise offset: strength of noise that is constant within each channel.", least=0
    )
    timestep_distribution: str = flag(
        "uniform",
        "Distribution of training timesteps. uniform: all alike. logit_normal: most in the middle "
        "(arXiv:2403.03206). power: u ** timestep_power of the schedule, for uniform u.",
        choices=TIMESTEP_DISTRIBUTIONS,
    )
    logit_mean: float = flag(
        0.0,
        "Mean of the logit-normal distribution; below 0 there is less noise.",
        needs=(_LOGIT_NORMAL,),
    )
    logit_std: float = flag(
        1.0, "Standard deviation of the logit-normal distribution.", needs=(_LOGIT_NORMAL,), above=0
    )
    timestep_power: float = flag(
        1.25,
        "Power of the power distribution; above 1 there is less noise.",
        needs=(Need("timestep_distribution", ("power",)),),
        above=0,
    )
