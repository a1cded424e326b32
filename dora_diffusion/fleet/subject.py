"""One task of a fleet: a subject is trained, on whatever worker has it."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion import devices, system
from dora_diffusion.config import TrainConfig
from dora_diffusion.fleet.records import DONE, FAILED, RUNNING, SubjectRecord, cause_of
from dora_diffusion.fleet.results import FleetResults
from dora_diffusion.fleet.workers import Worker
from dora_diffusion.training.checkpoint import checkpoints_in
from dora_diffusion.training.events import CheckpointSaved, Event, StepDone, TrainingStarted
from dora_diffusion.training.folders import LOCK_NAME
from dora_diffusion.training.loop import train

# How long a lost worker's process may still have its folder, while its node dies.
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class FleetSubject:
    """What a worker is given of a subject.

    Attributes:
        config: Its settings; where it is trained, the worker knows.
        output: Of the fleet: a folder, or a URL.
        record: Its record as it begins.
    """

    config: TrainConfig
    output: str
    record: SubjectRecord


class _Meter:
    """What a task takes, since it was made.

    Attributes:
        started: When its first step began; None before.
        steps: Optimizer steps that are done.
        copied: Bytes that were copied to a URL.
    """

    def __init__(self, waited: float) -> None:
        self._begun, self._cpu = time.perf_counter() - waited, time.process_time()
        self._read, self._written = _bytes_so_far()
        self.started: float | None = None
        self.steps = self.copied = 0

    def figures(self) -> dict[str, Any]:
        """All of it, as a record has it."""
        now = time.perf_counter()
        started = now if self.started is None else self.started
        read, written = _bytes_so_far()
        return {
            "start_seconds": round(started - self._begun, 3),
            "train_seconds": round(now - started, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "steps": self.steps,
            "peak_bytes": devices.peak_memory() or int(system.peak_memory() * 2**30),
            "read_bytes": read - self._read,
            "written_bytes": written - self._written + self.copied,
        }


def _bytes_so_far() -> tuple[int, int]:
    """Bytes that this process has read and written; zeros where the system does not count them."""
    import psutil

    try:
        counts: Any = psutil.Process().io_counters()
    except (AttributeError, psutil.Error, OSError):  # macOS; a container that hides them
        return 0, 0
    # Linux counts what was asked for too, whether the disk was needed for it or not.
    read, written = (getattr(counts, f"{kind}_chars", None) for kind in ("read", "write"))
    return (
        int(counts.read_bytes if read is None else read),
        int(counts.write_bytes if written is None else written),
    )


def train_subject(subject: FleetSubject, worker: Worker) -> SubjectRecord:
    """Train a subject, from the last checkpoint that an earlier worker left.

    Returns:
        Its record, with the cause if it failed.

    Raises:
        KeyboardInterrupt: If a signal stopped it; it resumes later.
    """
    meter = _Meter(worker.waited)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"dora_diffusion\.")
        try:
            return _train(subject, worker, meter, caught)
        except Exception as error:
            cause = cause_of(error)
            return _recorded(subject, meter, caught, status=FAILED, cause=cause)
        finally:
            gc.collect()  # The run's modules hold each other.
            devices.release_memory()


def _recorded(
    subject: FleetSubject, meter: _Meter, caught: Sequence[Any], **changes: Any
) -> SubjectRecord:
    texts = dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
    return replace(subject.record, warnings=tuple(texts), **meter.figures(), **changes)


def _train(
    subject: FleetSubject, worker: Worker, meter: _Meter, caught: Sequence[Any]
) -> SubjectRecord:
    name, results = subject.record.name, FleetResults(subject.output)
    resumes = _is_begun(subject, results.record(name))
    if subject.config.overwrite_output_dir and not resumes:
        results.clear(name)
    folder = results.begin(subject.record)

    def on_event(event: Event) -> None:
        if isinstance(event, TrainingStarted):
            meter.started, meter.steps = time.perf_counter(), event.step
        elif isinstance(event, StepDone):
            meter.steps = event.step
            worker.tell(step=event.step, total=event.total_steps, loss=event.loss)
        if isinstance(event, StepDone | CheckpointSaved):
            results.keep(name, folder)

    try:
        config = _in_folder(subject.config, folder, resumes=resumes)
        result = train(config, on_event, load=worker.load)
        if result.interrupted:
            results.keep(name, folder)
            raise KeyboardInterrupt
        results.publish(name, folder)
        meter.copied = results.copied_bytes
        samples = tuple(path.relative_to(folder).as_posix() for path in result.samples.values())
        record = _recorded(subject, meter, caught, status=DONE, samples=samples)
        results.finish(record)
        return record
    finally:
        meter.copied = results.copied_bytes
        results.leave(name)


def _is_begun(subject: FleetSubject, before: SubjectRecord | None) -> bool:
    """Whether an earlier worker began it, and what it left is to be resumed."""
    if before is None or before.status != RUNNING:
        return False
    # What is trained anew is so once, and not by each worker that it is given to.
    return not subject.config.overwrite_output_dir or before.run == subject.record.run


def _in_folder(config: TrainConfig, folder: Path, *, resumes: bool) -> TrainConfig:
    """The settings with where this worker writes, and from what it resumes."""
    if resumes:
        _wait_for_lock(folder)
    has_checkpoint = resumes and bool(checkpoints_in(folder))
    return replace(
        config,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if has_checkpoint else None,
        overwrite_output_dir=not has_checkpoint and (resumes or config.overwrite_output_dir),
    )


def _wait_for_lock(folder: Path) -> None:
    """A lost worker may have its folder a moment longer than its node answers."""
    from filelock import FileLock, Timeout

    if (folder / LOCK_NAME).exists():
        with suppress(Timeout, OSError, NotImplementedError):
            FileLock(folder / LOCK_NAME, timeout=_LOCK_SECONDS).acquire().lock.release()
