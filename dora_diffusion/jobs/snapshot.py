"""What the page shows of jobs, read from the runs folder alone."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.jobs import queue, records
from dora_diffusion.jobs.checkpoints import (
    RESULT_NAME,
    adapter_checkpoints,
    chosen_in,
    result_adapter,
)
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.logs import last_error, read_metrics
from dora_diffusion.jobs.workspace import Workspace

_KILLED = (
    "the process ended unexpectedly (killed, or the machine ran out of memory); "
    "Resume continues from the last checkpoint"
)


@dataclass(frozen=True)
class Job:
    """One job as its folder tells it.

    Attributes:
        folder: Where it lies.
        record: What was asked for.
        state: ``"waiting"``, ``"running"``, ``"stopping"``, ``"done"``, ``"stopped"``,
            ``"failed"`` or ``"crashed"``.
        settings: Training settings (settings.yaml).
        progress: What the worker last said.
        result: How it ended; None before that.
        cause: Why it failed or crashed, in one line with what to do.
        step: Optimizer steps done; of other jobs, how much is done in a unit of their own.
        total: As above, in all; 0 while that is unknown.
        step_seconds: Median time of the latest steps; None before there are some.
        may_kill: Stop was asked for long ago, and it still runs.
        position: Place in the queue from 1; 0 when it does not wait.
        checkpoints: Names of its complete checkpoints, oldest first.
        samples: Sample images: the final ones, then from the newest.
        chosen: What was chosen to stand for it: a checkpoint, ``"result"``, or ``""``.
    """

    folder: Path
    record: records.JobRecord
    state: str
    settings: Mapping[str, Any]
    progress: records.JobProgress
    result: records.JobResult | None
    cause: str = ""
    step: int = 0
    total: int = 0
    step_seconds: float | None = None
    may_kill: bool = False
    position: int = 0
    checkpoints: tuple[str, ...] = ()
    samples: tuple[Path, ...] = ()
    chosen: str = ""

    @property
    def id(self) -> str:
        """Name of its folder."""
        return self.folder.name

    @property
    def made(self) -> str:
        """When it was asked for, as its id says: ``2026-11-25 16:03``."""
        return f"{self.id[:4]}-{self.id[4:6]}-{self.id[6:8]} {self.id[9:11]}:{self.id[11:13]}"

    @property
    def request(self) -> records.JobRequest:
        """What is to be done."""
        return self.record.request

    @property
    def kind(self) -> str:
        """``"train"``, ``"merge"``, ``"compare"``, ``"push"`` or ``"analyze"``."""
        return self.request.kind

    @property
    def title(self) -> str:
        """What the page calls it."""
        return self.record.title

    @property
    def label(self) -> str:
        """What a list of many calls it: with its date, and its time where the title lacks it."""
        is_timed = self.title.endswith(self.made[11:])
        return f"{self.title} · {self.made[5:10] if is_timed else self.made[5:]}"

    @property
    def is_active(self) -> bool:
        """Whether its process lives."""
        return self.state in ("running", "stopping")

    @property
    def has_ended(self) -> bool:
        """Whether it neither waits nor runs."""
        return not self.is_active and self.state != "waiting"

    @property
    def remaining_seconds(self) -> float | None:
        """Time that the remaining steps take at the measured pace; None if unknown."""
        if self.step_seconds is None or not self.total:
            return None
        return (self.total - self.step) * self.step_seconds

    @property
    def trigger(self) -> str:
        """The trigger words."""
        if isinstance(self.request, records.MergeRequest):
            return self.request.trigger
        token, word = self.settings.get("token") or "", self.settings.get("class_word") or ""
        return self.progress.trigger or f"{token} {word}".strip()

    @property
    def base(self) -> str:
        """The base model."""
        return str(self.settings.get("pretrained_model_name_or_path") or self.request.base)

    @property
    def stands(self) -> str:
        """What stands for a run: what was chosen, its result, or its newest checkpoint."""
        if self.kind != "train":
            return ""
        last = self.checkpoints[-1] if self.checkpoints else ""
        return self.chosen or (RESULT_NAME if self.state == "done" else last)

    @property
    def can_generate(self) -> bool:
        """Whether it left an adapter: its result, or a checkpoint's."""
        return bool(self.stands)

    def step_of(self, name: str) -> int:
        """The steps that a checkpoint or the result was trained for."""
        return self.step if name == RESULT_NAME else int(name.removeprefix("checkpoint-"))


def snapshot(runs_dir: Path) -> tuple[Job, ...]:
    """All jobs, newest first, as the disk and the process table tell them now."""
    workspace, now = Workspace(runs_dir), time.time()
    places = {folder: place for place, folder in enumerate(queue.waiting_jobs(workspace), start=1)}
    folders = reversed(workspace.job_folders)
    jobs = (read_job(folder, now, places.get(folder, 0)) for folder in folders)
    return tuple(job for job in jobs if job is not None)


def read_job(folder: Path, now: float | None = None, position: int = 0) -> Job | None:
    """One job; None if the folder holds none."""
    record = records.read_record(folder)
    if record is None:
        return None
    # In this order: a worker writes its result before it ends.
    alive = queue.worker_of(folder) is not None
    result, progress = records.read_result(folder), records.read_progress(folder)
    state, cause = _state(folder, record.request, result, alive)
    metrics, settings = read_metrics(folder), _settings(folder / records.SETTINGS)
    step, total = progress.done, progress.total
    if isinstance(record.request, records.TrainRequest):
        step = int(metrics[-1]["step"]) if metrics else 0
        total = int(progress.total_steps or settings.get("max_train_steps") or 0)
    checkpoints = adapter_checkpoints(folder)
    recent = [float(line["seconds"]) for line in metrics[-20:]]
    # Deleted while it was read: the files that were no longer there would look like a crash.
    if not folder.exists():
        return None
    return Job(
        folder=folder,
        record=record,
        state=state,
        settings=settings,
        progress=progress,
        result=result,
        cause=cause,
        step=step,
        total=total,
        step_seconds=statistics.median(recent) if recent else None,
        may_kill=queue.may_kill(folder, time.time() if now is None else now),
        position=position,
        checkpoints=checkpoints,
        samples=_samples(folder),
        chosen=chosen_in(folder, (*checkpoints, *([RESULT_NAME] if state == "done" else []))),
    )


def read_run(workspace: Workspace, job_id: object) -> Job:
    """A job by its id, as it is now.

    Raises:
        RequestError: If there is none.
    """
    job = read_job(workspace.job(job_id))
    if job is None:
        raise RequestError("this run no longer exists; choose another one")
    return job


def _state(
    folder: Path, request: records.JobRequest, result: records.JobResult | None, alive: bool
) -> tuple[str, str]:
    """State and cause. A result wins over a process, which wins over the queue."""
    if result is None:
        if alive:
            return ("stopping" if queue.stop_asked(folder) is not None else "running"), ""
        if queue.is_waiting(folder):
            return "waiting", ""
    elif result.code == 0:
        wrong = _unusable_result(folder, request)
        return ("failed", wrong) if wrong else ("done", "")
    elif result.code is not None:
        if result.code > 128:
            return "stopped", ""
        return "failed", last_error(folder) or "it failed without saying why; the log may help"
    return "crashed", last_error(folder) or _KILLED


def _unusable_result(folder: Path, request: records.JobRequest) -> str:
    """Why a job that says it is done is not: its result must be there, and open."""
    if isinstance(request, records.MergeRequest):
        return "" if Path(request.output).exists() else "the merged model is gone"
    if isinstance(request, records.AnalyzeRequest):
        return "" if Path(request.output).exists() else "the analysis is gone"
    if not isinstance(request, records.TrainRequest):
        return ""
    file = result_adapter(folder)
    if file is None:
        return "the run ended without an adapter file"
    return _opens(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _opens(file: Path, modified: int) -> str:
    """Open an adapter once for each time it was written."""
    from dora_diffusion.formats.adapter.inspect import report_on

    try:
        report_on(file)
    except (ValueError, OSError) as error:
        return f"its adapter file cannot be opened: {error}"
    return ""


def _samples(folder: Path) -> tuple[Path, ...]:
    """Sample images: the final ones first, then by step from the newest."""
    samples = folder / "samples"
    final = [samples / f"{name}.png" for name in ("adapted", "base")]
    steps = sorted(samples.glob("step-*.png"), reverse=True)
    return tuple(path for path in [*final, *steps] if path.is_file())


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        return _yaml(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=512)
def _yaml(path: Path, modified: int) -> Mapping[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
