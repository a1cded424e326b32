"""A training run on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from dora_diffusion.config.resume import listed
from dora_diffusion.console.progress import ProgressBar, say
from dora_diffusion.training.events import (
    CachingProgress,
    CheckpointSaved,
    ClassImagesProgress,
    Event,
    ModelLoading,
    SampleSaved,
    SamplingProgress,
    StepDone,
    TrainingStarted,
)
from dora_diffusion.wording import counted


class TrainProgress:
    """A progress bar with loss and time left, from the trainer's events."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.images: ProgressBar | None = None
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
                self._count_images("class images", done, total)
            case CachingProgress(done, total):
                self._count_images("caching latents", done, total)
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
        for bar in (self.images, self.bar):
            if bar is not None:
                bar.close()

    def _count_images(self, what: str, done: int, total: int) -> None:
        if self.images is None:
            self.images = ProgressBar("image", desc=what)
        self.images(done, total)
        if done >= total:
            self.images.close()
            self.images = None

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
        line += f"; steps {step + 1} to {step + dropped} are repeated"
    return line + ("; nothing is left to train" if step == total else "")
