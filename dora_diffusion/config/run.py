"""Settings of device, samples, validation and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dora_diffusion.config.features.prior import PRIOR
from dora_diffusion.config.fields import (
    PRECISIONS,
    AnyOf,
    Need,
    TextOrPath,
    flag,
    free_flag,
)
from dora_diffusion.config.images import GUIDANCE_SCALE, MOST_STEPS, STEPS

OFFLOADS = ("auto", "none", "model")
SHARDINGS = ("auto", "none", "fsdp")

_SAMPLES = Need("num_validation_images")


def _checkpoints(config: Any) -> str | None:
    """Checkpoints (`--checkpointing_steps` above 0)."""
    return "checkpointing_steps is 0" if config.checkpointing_steps == 0 else None


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Precision, memory and device."""

    heading: ClassVar = "Memory and precision"

    mixed_precision: str = free_flag(
        "auto",
        "Precision of the frozen model; trained parameters are float32. auto: the precision of "
        "accelerate launch, else bf16 on a GPU that supports it, fp16 on other GPUs, and float32 "
        "(no) on a CPU.",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool = free_flag(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    offload: str = flag(
        "auto",
        "Offloading to the machine's memory. model: VAE and untrained text encoders leave the GPU "
        "once their outputs are cached; for samples, each component is on the GPU only while it "
        "computes. none: everything stays on the GPU. auto: model on a GPU with memory of its own.",
        choices=OFFLOADS,
        resume="ignored",
    )
    sharding: str = flag(
        "auto",
        "Sharding of the model over the processes of accelerate launch. fsdp: each process has a "
        "part of every weight (FSDP2), for full fine-tuning and models that do not fit on a single "
        "GPU. none: each process has all weights (DDP), which is faster. auto: fsdp with "
        "accelerate launch --use_fsdp, else none.",
        choices=SHARDINGS,
        resume="ignored",
    )
    allow_tf32: bool = free_flag(False, "TensorFloat-32 on Ampere and later GPUs.")
    seed: int = flag(0, "Random seed.", least=0)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Sample images and logging."""

    heading: ClassVar = "Validation"
    common: ClassVar = {"ends_run": True}

    validation_prompt: list[str] = free_flag(
        [],
        "Validation prompts: with the token for the subject, without it (--drift) to monitor "
        "language drift. Each may end with sd-scripts' options: --n NEGATIVE --d SEED --w WIDTH "
        "--h HEIGHT --l GUIDANCE --s STEPS --ss SCHEDULER.",
        derived="the instance prompt",
        needs=(_SAMPLES,),
    )
    sample_prompts: TextOrPath[str | None] = flag(
        None,
        "File of further validation prompts, one per line.",
        resume="ignored",  # its lines are validation prompts of the run
        needs=(_SAMPLES,),
        is_path=True,
    )
    sample_at_start: bool = flag(
        False, "Sample before the first step too.", resume="ignored", needs=(_SAMPLES,)
    )
    num_validation_images: int = free_flag(
        4, "Sample images per validation prompt; 0 samples nothing.", least=0
    )
    validation_steps: int | None = free_flag(
        None,
        "Sample every N steps, and at the end; 0 samples at the end only.",
        derived="200",
        needs=(_SAMPLES,),
        least=0,
    )
    validation_epochs: int | None = free_flag(
        None,
        "Sample every N epochs, instead of validation_steps.",
        derived="none, validation_steps is used",
        needs=(_SAMPLES, Need("validation_steps", (None,))),
        above=0,
    )
    validation_inference_steps: int = free_flag(
        STEPS,
        "Denoising steps of samples and class images.",
        needs=(AnyOf((_SAMPLES, PRIOR)),),
        above=0,
        most=MOST_STEPS,
    )
    validation_guidance_scale: float = free_flag(
        GUIDANCE_SCALE,
        "Guidance scale (CFG scale) of samples and class images.",
        needs=(AnyOf((_SAMPLES, PRIOR)),),
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Output, checkpoints and resuming."""

    heading: ClassVar = "Output"
    common: ClassVar = {"resume": "ignored"}  # attributes of all its settings

    output_dir: TextOrPath[str] = flag("dreambooth-output", "Output folder.", is_path=True)
    overwrite_output_dir: bool = flag(
        False, "Replace an earlier result in output_dir, and delete its checkpoints."
    )
    checkpointing_steps: int | None = flag(
        None,
        "Save a checkpoint every N steps and at the end; 0 saves none, so a finished run cannot be "
        "extended.",
        derived="100",
        least=0,
    )
    checkpointing_minutes: float = flag(
        5.0,
        "Also save a checkpoint every X minutes; 0 saves none in between.",
        needs=(_checkpoints,),
        least=0,
    )
    checkpoints_total_limit: int | None = flag(
        None,
        "Maximum number of checkpoints; the newest are kept.",
        derived="all",
        needs=(_checkpoints,),
        above=0,
    )
    resume_from_checkpoint: TextOrPath[str | None] = flag(
        None, "Checkpoint folder to resume from, or 'latest' in OUTPUT_DIR.", is_path=True
    )
    feature: list[str] = flag(
        [],
        "Python files with features of your own, which are run: code, with settings that --help "
        "then lists. A copy is kept in OUTPUT_DIR/features.",
        is_path=True,
    )
    report_to: str | None = flag(None, "Experiment tracker.", choices=("tensorboard", "wandb"))
    logging_dir: TextOrPath[str] = flag(
        "logs", "Folder of the tracker's logs, in OUTPUT_DIR.", needs=(Need("report_to"),)
    )
    push_to_hub: bool = flag(
        False, "Upload the result to a private repository on the Hugging Face hub after training."
    )
    hub_model_id: str | None = flag(
        None,
        "Repository to upload to, as NAME/MODEL.",
        derived="none, required by --push_to_hub",
        needs=(Need("push_to_hub"),),
    )
