"""``dora-diffusion train``."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

from dora_diffusion.commands.flags import given_settings, train_config
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.resume import listed
from dora_diffusion.console.progress import Counter, say
from dora_diffusion.training.events import (
    CheckpointSaved,
    ClassImagesProgress,
    Event,
    ModelLoading,
    SampleSaved,
    SamplingProgress,
    StepDone,
    TrainingStarted,
)
from dora_diffusion.wording import counted, quoted

if TYPE_CHECKING:
    from dora_diffusion.training.loop import TrainResult


def run(args: argparse.Namespace) -> int:
    """Train, with a progress bar. Returns the exit code."""
    config = train_config(args)
    _say_toy_model(config, given_settings(args))
    if config.push_to_hub:
        from dora_diffusion.hub import check

        check(config.hub_model_id or "")
    from dora_diffusion.training.loop import train

    progress = TrainProgress()
    try:
        result = train(config, progress)
    finally:
        progress.close()
    if result.signal_number is not None:
        if progress.started:
            print(stopped_line(result))
        return 128 + result.signal_number
    if result.adapter is not None:
        print(f"done: {result.adapter}")
        print(trigger_line(progress.trigger, config.instance_prompt or ""))
        if config.push_to_hub:
            from dora_diffusion.hub import push

            print(push(result.output_dir, config.hub_model_id or "", private=True))
    return 0


def trigger_line(trigger: str, prompt: str) -> str:
    """What to write in a prompt: the trigger words, or a caption where there are none."""
    if trigger:
        return f"write {trigger!r} in a prompt to get the subject"
    return f"it has no trigger word: write prompts like its captions, such as {quoted(prompt)}"


def stopped_line(result: TrainResult) -> str:
    """Where an interrupted run stopped, and from where it can be resumed."""
    from dora_diffusion.training.checkpoint import step_of

    where = f"stopped at step {result.steps} of {result.total_steps}"
    if result.checkpoint is None:
        return f"{where}; no checkpoint was saved"
    if step_of(result.checkpoint) < result.steps:
        return f"{where}; --resume_from_checkpoint latest resumes from {result.checkpoint.name}"
    return f"{where}, checkpoint saved; resume with --resume_from_checkpoint latest"


def _say_toy_model(config: TrainConfig, given: set[str]) -> None:
    """Say loudly that no base model was named."""
    if "pretrained_model_name_or_path" not in given:
        warnings.warn(
            f"NO BASE MODEL WAS GIVEN: {config.pretrained_model_name_or_path} is trained, a toy "
            "model of 64 pixels that knows only its own drawn world and cannot learn a real "
            "photo; name yours with --pretrained_model_name_or_path",
            stacklevel=1,
        )


class TrainProgress:
    """A progress bar with loss and time left, from the trainer's events."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.class_images: Counter | None = None
        self.trigger = ""

    @property
    def started(self) -> bool:
        """Whether this process reports."""
        return self.bar is not None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case ModelLoading():
                precision = {"no": "float32"}.get(event.precision, event.precision)
                print(f"training {event.model} on {event.device} in {precision}", flush=True)
            case TrainingStarted():
                self._start(event)
            case ClassImagesProgress(done, total):
                self._count_class_images(done, total)
            case SamplingProgress(done, total):
                share = "" if done == total else f"sampling {100 * done // total}%"
                # In a log, every refresh would be a line.
                self.bar.set_description_str(share, refresh=sys.stderr.isatty())
            case StepDone():
                self.bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                self.bar.update()
            case SampleSaved():
                say(f"sample: {event.path}")
            case CheckpointSaved():
                say(f"checkpoint: {event.path}")

    def close(self) -> None:
        """End the bar's line, so that what is said next has one of its own."""
        for bar in (self.class_images, self.bar):
            if bar is not None:
                bar.close()

    def _count_class_images(self, done: int, total: int) -> None:
        if self.class_images is None:
            self.class_images = Counter("image", description="class images")
        self.class_images(done, total)
        if done >= total:
            self.class_images.close()

    def _start(self, event: TrainingStarted) -> None:
        from tqdm import tqdm

        self.trigger = event.trigger
        print(
            f"{event.family} on {event.device}: {counted(event.photos, 'photo')} at "
            f"{event.resolution} px, {event.adapter}"
        )
        if event.resumed_from:
            print(_resumed_line(event))
        if event.changed:
            print(f"changed from step {event.step + 1} on: {listed(event.changed)}")
        if event.unused:
            print(f"without effect, since no step is left: {listed(event.unused)}")
        self.bar = tqdm(
            total=event.total_steps, initial=event.step, unit="step", dynamic_ncols=True
        )


def _resumed_line(event: TrainingStarted) -> str:
    step, total, dropped = event.step, event.total_steps, event.steps_dropped
    line = f"resuming from {event.resumed_from}, at step {step} of {total}"
    if dropped:
        line += f"; steps {step + 1} to {step + dropped} are trained again"
    return line + ("; nothing is left to train" if step == total else "")
