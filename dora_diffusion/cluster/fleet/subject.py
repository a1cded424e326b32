"""One task of a fleet: training of a subject, or a pack of subjects, on a worker."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion import system
from dora_diffusion.cluster.fleet.queue import Worker
from dora_diffusion.cluster.fleet.results import (
    DONE,
    FAILED,
    RUNNING,
    FleetResults,
    SubjectRecord,
    cause_of,
    done_before,
)
from dora_diffusion.config import TrainConfig
from dora_diffusion.numerics import devices
from dora_diffusion.training import events
from dora_diffusion.training.folder import TrainResult
from dora_diffusion.training.pack import PackResult, train_pack
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.results.folders import LOCK_NAME

# Time that the process of a lost worker may still hold its folder.
_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class FleetSubject:
    """Subject for a worker.

    Attributes:
        config: Settings, except for the folder, which the worker chooses.
        output: Folder or URL of the fleet's results.
        record: Initial record.
    """

    config: TrainConfig
    output: str
    record: SubjectRecord


class _Meter:
    """Measures the cost of a task from its creation on.

    Args:
        waited: Seconds to add for the time before.
        share: Number of subjects in the task.
    """

    def __init__(self, waited: float, share: int) -> None:
        self._begun, self._cpu = time.perf_counter() - waited, time.process_time()
        self._share = share

    def figures(self, started: float | None) -> dict[str, Any]:
        """Return the cost as fields of a record.

        Args:
            started: Time of the first step; None if there was none.
        """
        now, share = time.perf_counter(), self._share
        started = now if started is None else started
        return {
            "start_seconds": round(started - self._begun, 3),
            "train_seconds": round(now - started, 3),
            "cpu_seconds": round((time.process_time() - self._cpu) / share, 3),
            "peak_bytes": devices.peak_memory() or int(system.peak_memory() * 2**30),
            "pack": share,
        }


class _SubjectRun:
    """Training of a subject in this process.

    Attributes:
        subject: The subject.
        results: Storage of the results.
        folder: Local folder of the training.
        config: Settings with this folder.
        done: Record of the subject if it has been completed elsewhere.
        started: Time of the first step; None before it.
        steps: Optimizer steps done.
        has_left: True once the subject has left its pack.
    """

    def __init__(self, subject: FleetSubject) -> None:
        self.subject, self.results = subject, FleetResults(subject.output)
        self.started: float | None = None
        self.has_left, self.steps, name = False, 0, subject.record.name
        self.folder, self.config = self.results.folder(name), subject.config
        _wait_for_lock(self.folder)
        before = self.results.record(name)
        # A worker assumed lost, or a fleet on another machine, may have completed it.
        self.done = done_before(before, subject.record, self.config)
        if self.done is not None:
            return
        is_ours = before is not None and before.run == subject.record.run
        # With overwrite_output_dir, only the first worker starts from scratch.
        resumes = before is not None and before.status == RUNNING
        resumes = resumes and (is_ours or not subject.config.overwrite_output_dir)
        if subject.config.overwrite_output_dir and not resumes:
            self.results.clear(name)
        self.results.fetch(name)
        self.config = _in_folder(subject.config, self.folder, resumes=resumes)

    def on_event(self, event: events.Event) -> None:
        """Record an event, and store new checkpoints."""
        if isinstance(event, events.ModelLoading) and not self.has_left:
            # By now the folder was checked and does not belong to another run.
            self.results.save(self.subject.record)
        self.has_left = self.has_left or isinstance(event, events.SubjectLeft)
        if isinstance(event, events.TrainingStarted):
            self.started, self.steps = time.perf_counter(), event.step
        elif isinstance(event, events.StepDone):
            self.steps = event.step
        if isinstance(event, events.StepDone | events.CheckpointSaved):
            self.keep()

    def keep(self) -> None:
        self.results.keep(self.subject.record.name, self.folder)

    def record(self, meter: _Meter, caught: Sequence[Any], **changes: Any) -> SubjectRecord:
        """Return the subject's record, with the cost so far."""
        figures = meter.figures(self.started)
        texts = dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
        return replace(
            self.subject.record, warnings=tuple(texts), steps=self.steps, **figures, **changes
        )

    def finish(self, result: TrainResult, meter: _Meter, caught: Sequence[Any]) -> SubjectRecord:
        """Publish the results, then the record."""
        self.results.publish(self.subject.record.name, self.folder)
        samples = [path.relative_to(self.folder).as_posix() for path in result.samples.values()]
        record = self.record(meter, caught, status=DONE, samples=tuple(samples))
        self.results.save(record)
        return record


def train_subjects(subjects: Sequence[FleetSubject], worker: Worker) -> list[SubjectRecord]:
    """Train a subject or a pack of subjects, resuming from checkpoints of an earlier worker.

    Returns:
        Record of each subject, with the cause if it failed.

    Raises:
        KeyboardInterrupt: If a signal stopped the training, which can be resumed.
    """
    meter = _Meter(worker.waited, len(subjects))
    runs: dict[str, _SubjectRun] = {}
    records: dict[str, SubjectRecord] = {}

    def fail(subject: FleetSubject, error: Exception) -> None:
        name, cause = subject.record.name, cause_of(error)
        records[name] = replace(subject.record, status=FAILED, cause=cause)
        if name in runs:
            records[name] = runs[name].record(meter, caught, status=FAILED, cause=cause)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"dora_diffusion\.")
        try:
            for subject in subjects:
                try:
                    runs[subject.record.name] = _SubjectRun(subject)
                except Exception as error:
                    fail(subject, error)
            records |= {name: t.done for name, t in runs.items() if t.done is not None}
            left = {name: t for name, t in runs.items() if t.done is None}
            result = _train(left, worker)
            for name, failure in result.failures.items():
                fail(left.pop(name).subject, failure)
            for name, run in left.items():
                try:
                    records[name] = run.finish(result.results[name], meter, caught)
                except Exception as error:
                    fail(run.subject, error)
        finally:
            for name, run in runs.items():
                run.results.leave(name)
            gc.collect()  # The runs' modules have reference cycles.
            devices.release_memory()
    return [records[subject.record.name] for subject in subjects]


def _train(runs: Mapping[str, _SubjectRun], worker: Worker) -> PackResult:
    """Train a single subject, or several as a pack.

    Raises:
        KeyboardInterrupt: If a signal stopped the training.
    """

    def on_event(name: str, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            worker.report(event)
        for run in [runs[name]] if name else runs.values():  # "" is the whole pack.
            run.on_event(event)

    configs = {name: run.config for name, run in runs.items()}
    pack_result = PackResult()
    try:
        if len(configs) > 1:
            pack_result = train_pack(configs, on_event, load=worker.load)
        for name, config in configs.items() if len(configs) == 1 else ():
            result = train(config, partial(on_event, name), load=worker.load)
            pack_result = PackResult({name: result}, {}, result.signal_number)
    except Exception as error:
        return PackResult({}, dict.fromkeys(configs, error))
    if pack_result.signal_number is not None:
        for name in pack_result.results:
            runs[name].keep()
        raise KeyboardInterrupt
    return pack_result


def _in_folder(config: TrainConfig, folder: Path, *, resumes: bool) -> TrainConfig:
    """Return the settings with this worker's folder and the checkpoint to resume from."""
    has_checkpoint = resumes and bool(checkpoints_in(folder))
    return replace(
        config,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if has_checkpoint else None,
        overwrite_output_dir=not has_checkpoint and (resumes or config.overwrite_output_dir),
    )


def _wait_for_lock(folder: Path) -> None:
    """Wait until a lost worker's process has released the folder."""
    from filelock import FileLock, Timeout

    if (folder / LOCK_NAME).exists():
        lock = FileLock(folder / LOCK_NAME, timeout=_LOCK_SECONDS)
        with suppress(Timeout, OSError, NotImplementedError), lock:
            pass
