"""The training run, from settings to a finished folder."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from pathlib import Path

from dora_diffusion.config import TrainConfig, unusual_rates, without_effect
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.accelerator import make_accelerator
from dora_diffusion.training.folders import output_folder
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.resume import start_run
from dora_diffusion.training.run import Run, TrainResult
from dora_diffusion.training.samples import check_prompts
from dora_diffusion.training.session import LoadBase, open_session
from dora_diffusion.training.stop import Stopped, StopRequest
from dora_diffusion.training.subject import Subject, outside_toy_world, subjects_of

__all__ = ["TrainResult", "TrainingError", "train"]


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    load: LoadBase | None = None,
) -> TrainResult:
    """Teach a model a subject from photos, and write the result to ``config.output_dir``.

    SIGINT, SIGTERM and SIGHUP stop the run: before its first step at once, later with a checkpoint
    after the step. A second SIGINT or SIGTERM loses nothing; a third one ends the process.

    Args:
        config: All settings.
        on_event: Called in the main process with each of `dora_diffusion.training.events`.
        load: Loads the base model; a `models.load.BaseCache` keeps it for the next run.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: Before anything is trained.
        TrainingError: If loss, gradients or weights stop being finite; nothing is written from
            there on, and what was there stays.
        DiskFullError: If neither a checkpoint can be written nor its adapter alone, or not the
            adapter in the end; earlier checkpoints are kept.

    Any other error in the middle of training saves a checkpoint first.

    Example:
        >>> result = train(TrainConfig(
        ...     instance_data_dir="samples/bolt_mug", instance_prompt="a photo of a sks mug",
        ...     max_train_steps=2, num_validation_images=0, checkpointing_steps=0,
        ...     output_dir="demo-output/doctest", overwrite_output_dir=True))
        >>> result.adapter.name
        'pytorch_lora_weights.safetensors'
    """
    config, subjects = checked(config)
    output_dir = Path(config.output_dir)
    with StopRequest() as stop:
        try:
            accelerator = make_accelerator(config)
            is_main = accelerator.is_main_process
            show = on_event if on_event and is_main else events.ignore
            with output_folder(config) if is_main else contextlib.nullcontext():
                accelerator.wait_for_everyone()
                model, device = config.pretrained_model_name_or_path, str(accelerator.device)
                show(events.ModelLoading(model, device, config.mixed_precision))
                session = open_session(config, subjects, accelerator, show, load=load)
                run = Run(*start_run(session, output_dir), output_dir, show, stop)
                result = run.finish(run.train())
                accelerator.end_training()
                return result
        except Stopped:
            return TrainResult(output_dir, None, 0, 0, stop.signal_number, {})


def checked(config: TrainConfig) -> tuple[TrainConfig, list[Subject]]:
    """A run's settings with its precision, and its subjects; what cannot work is refused.

    Raises:
        ConfigError: Before anything is loaded.

    Warns:
        UserWarning: Of settings without effect, and of what the base model cannot learn.
    """
    config = config.with_sample_prompts()
    subjects = subjects_of(config)
    check_prompts(config)
    for reason in (*without_effect(config).values(), *unusual_rates(config)):
        warnings.warn(reason, stacklevel=3)
    base, words = config.pretrained_model_name_or_path, [s.class_word for s in subjects]
    if toy := next(filter(None, (outside_toy_world(base, word) for word in words)), ""):
        warnings.warn(f"{toy} Name another pretrained_model_name_or_path.", stacklevel=3)
    return replace(config, mixed_precision=precision_of(config.mixed_precision)), subjects
