"""What a run tells whoever watches it, one class per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.derived import Changes


@dataclass(frozen=True)
class ModelLoading:
    """The base model is about to be loaded."""

    model: str
    device: str
    precision: str


@dataclass(frozen=True)
class ClassImagesAnnounced:
    """So many class images are made first; again once it was timed how long that takes."""

    count: int
    seconds: float | None = None


@dataclass(frozen=True)
class ClassImagesProgress:
    """So many of the class images are there."""

    done: int
    total: int


@dataclass(frozen=True)
class CachingProgress:
    """So many of the run's crops are encoded."""

    done: int
    total: int


@dataclass(frozen=True)
class TrainingStarted:
    """Everything is ready for the step after ``step``, which is 0 for a fresh run.

    Attributes:
        resumed_from: Name of the checkpoint.
        steps_dropped: Steps after that checkpoint, which are repeated.
        adapter: What was adapted, in words.
        changed: Setting -> (before, now) of a resumed run.
        unused: The same, of settings without effect since no step is left.
    """

    step: int
    total_steps: int
    resumed_from: str | None
    steps_dropped: int
    photos: int
    resolution: int
    family: str
    schedule: str
    device: str
    adapter: str
    trigger: str
    changed: Changes
    unused: Changes


@dataclass(frozen=True)
class StepDone:
    """An optimizer step; ``record`` is its line of ``metrics.jsonl``."""

    step: int
    total_steps: int
    loss: float
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingProgress:
    """Denoising steps of the sample images."""

    done: int
    total: int


@dataclass(frozen=True)
class SampleSaved:
    """A sheet of sample images was written."""

    name: str
    path: Path


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that stays was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class TrainingEnded:
    """The run is over, after ``step`` optimizer steps."""

    step: int
    interrupted: bool


Event = (
    ModelLoading
    | ClassImagesAnnounced
    | ClassImagesProgress
    | CachingProgress
    | TrainingStarted
    | StepDone
    | SamplingProgress
    | SampleSaved
    | CheckpointSaved
    | TrainingEnded
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing."""
