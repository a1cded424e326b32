"""Events that a run reports to its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.derived import Changes


class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class ModelLoading(Event):
    """Loading of the base model begins."""

    model: str
    device: str
    precision: str


@dataclass(frozen=True)
class ClassImagesAnnounced(Event):
    """Number of class images to generate before training; sent again with an estimate of time.

    Attributes:
        count: The number.
        seconds: Estimated time of all; None before the first image is generated.
        folder: Folder that they are written to.
        advice: Setting that needs fewer of them; may be empty.
    """

    count: int
    seconds: float | None = None
    folder: str = ""
    advice: str = ""


@dataclass(frozen=True)
class ClassImagesProgress(Event):
    """Number of class images that exist."""

    done: int
    total: int


@dataclass(frozen=True)
class CachingProgress(Event):
    """Number of crops whose latents are cached."""

    done: int
    total: int


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Start of training. The next step is ``step + 1``; ``step`` is 0 for a new run.

    Attributes:
        resumed_from: Name of the checkpoint.
        steps_dropped: Number of steps after that checkpoint. They are repeated.
        adapter: Summary of the trained parameters.
        started_from: Adapter that the run started from; empty if the adapter is new.
        changed: Setting -> (value before, value now) of a resumed run.
        unused: Changed settings without effect because no step is left, in the same form.
        held_out: File names of the held-out photos.
    """

    step: int
    total_steps: int
    resumed_from: str | None
    steps_dropped: int
    photos: int
    resolutions: tuple[int, ...]
    family: str
    schedule: str
    device: str
    adapter: str
    trigger: str
    changed: Changes
    unused: Changes
    held_out: tuple[str, ...] = ()
    started_from: str = ""


@dataclass(frozen=True)
class StepDone(Event):
    """Completed optimizer step; ``record`` is its line of ``metrics.jsonl``."""

    step: int
    total_steps: int
    loss: float
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Validated(Event):
    """Validation on held-out photos; ``record`` is its line of ``metrics.jsonl``.

    Attributes:
        step: Number of completed optimizer steps.
        loss: Validation loss; None if the similarity of samples was measured instead.
        best_step: Step of the lowest loss so far; None before the first step.
        record: Values of the line.
    """

    step: int
    loss: float | None
    best_step: int | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingProgress(Event):
    """Number of denoising steps of the sample images that are done."""

    done: int
    total: int


@dataclass(frozen=True)
class SampleSaved(Event):
    """Sheet of sample images that was written."""

    name: str
    path: Path


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """Checkpoint that was written and is not temporary.

    Attributes:
        step: Number of completed optimizer steps.
        path: Folder of the checkpoint.
        removed: Names of earlier checkpoints that were removed since the last event.
    """

    step: int
    path: Path
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingEnded(Event):
    """End of a run.

    Attributes:
        step: Number of completed optimizer steps.
        interrupted: Whether a signal stopped the run.
        result_step: Step whose weights the result has; None if no result was written.
    """

    step: int
    interrupted: bool
    result_step: int | None = None


@dataclass(frozen=True)
class SubjectLeft(Event):
    """Failure of one subject of a pack. The pack continues without it."""

    reason: str


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore an event."""
