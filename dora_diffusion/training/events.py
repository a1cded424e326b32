"""Events of a run for whoever watches it, one class per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.config.derived import Changes

if TYPE_CHECKING:
    from dora_diffusion.training.results.effect import Effect


class Event:
    """Base of the events."""


@dataclass(frozen=True)
class ModelLoading(Event):
    """The base model is about to be loaded."""

    model: str
    device: str
    precision: str


@dataclass(frozen=True)
class ClassImagesAnnounced(Event):
    """Number of class images to make first; again once it was timed how long that takes."""

    count: int
    seconds: float | None = None


@dataclass(frozen=True)
class ClassImagesProgress(Event):
    """Number of class images that are there."""

    done: int
    total: int


@dataclass(frozen=True)
class CachingProgress(Event):
    """Number of the run's crops that are encoded."""

    done: int
    total: int


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Start of training: everything is ready for the step after ``step``, 0 for a fresh run.

    Attributes:
        resumed_from: Name of the checkpoint.
        steps_dropped: Steps after that checkpoint, which are repeated.
        adapter: What was adapted, in words.
        started_from: The adapter that it started from; empty for a fresh one.
        changed: Setting -> (before, now) of a resumed run.
        unused: The same, of settings without effect since no step is left.
        held_out: File names of the photos that are held out.
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
    """An optimizer step; ``record`` is its line of ``metrics.jsonl``."""

    step: int
    total_steps: int
    loss: float
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Validated(Event):
    """Validation on held-out photos; ``record`` is its line of ``metrics.jsonl``.

    Attributes:
        step: Optimizer steps done.
        loss: The validation loss; None where it was the samples' similarity that was measured.
        best_step: The step of the lowest loss so far; None before the first step.
        record: What is in the file.
    """

    step: int
    loss: float | None
    best_step: int | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingProgress(Event):
    """Denoising steps of the sample images."""

    done: int
    total: int


@dataclass(frozen=True)
class SampleSaved(Event):
    """A sheet of sample images was written."""

    name: str
    path: Path


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint that stays was written.

    Attributes:
        step: Optimizer steps done.
        path: Its folder.
        removed: Names of earlier checkpoints that were removed since the last one.
    """

    step: int
    path: Path
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class EffectMeasured(Event):
    """Distance by which the written adapter moves the model."""

    effect: Effect


@dataclass(frozen=True)
class TrainingEnded(Event):
    """The run is over, after ``step`` optimizer steps.

    Attributes:
        step: How many.
        interrupted: Whether it was asked to stop.
        result_step: The step that the result is of; None where none was written.
        stopped_early: Whether its patience was at an end.
    """

    step: int
    interrupted: bool
    result_step: int | None = None
    stopped_early: bool = False


@dataclass(frozen=True)
class SubjectLeft(Event):
    """A subject has left its pack, which continues without it."""

    reason: str


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing."""
