"""What the page shows of jobs, read from the runs folder alone."""

from __future__ import annotations

import functools
import json
import re
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dora_diffusion.jobs.queue import (
    CHOSEN,
    JOB,
    LOG,
    PROGRESS,
    RESULT,
    SETTINGS,
    is_waiting,
    may_kill,
    stop_asked,
    worker_of,
)
from dora_diffusion.jobs.workspace import Workspace, ids_in, read_json

RUNNING_STATES = ("running", "stopping")
RESULT_NAME = "result"
_LOG_BYTES = 60_000
_WARNINGS_BYTES = 4_000_000
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KILLED = (
    "the process ended without a word (killed, or the machine ran out of memory); "
    "Resume continues from the last checkpoint"
)


@dataclass(frozen=True)
class Job:
    """One job as its folder tells it.

    Attributes:
        id: Name of its folder.
        folder: Where it lies.
        kind: ``"train"``, ``"merge"``, ``"compare"`` or ``"push"``.
        title: What the page calls it.
        state: ``"waiting"``, ``"running"``, ``"stopping"``, ``"done"``, ``"stopped"``,
            ``"failed"`` or ``"crashed"``.
        facts: What was asked for (job.json).
        settings: Training settings (settings.yaml).
        progress: What the worker last said (progress.json).
        result: Exit code, times and peak memory (result.json).
        cause: Why it failed or crashed, in one line with what to do.
        step: Optimizer steps done.
        total: Optimizer steps asked for; 0 while that is unknown.
        step_seconds: Median time of the latest steps; None before there are some.
        may_kill: Stop was asked for long ago, and it still runs.
        position: Place in the queue from 1; 0 when it does not wait.
        checkpoints: Names of its complete checkpoints, oldest first.
        samples: Sample pictures: the final ones, then from the newest.
        chosen: What was chosen to stand for it: a checkpoint, ``"result"``, or ``""``.
    """

    id: str
    folder: Path
    kind: str
    title: str
    state: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    progress: Mapping[str, Any]
    result: Mapping[str, Any]
    cause: str = ""
    step: int = 0
    total: int = 0
    step_seconds: float | None = None
    may_kill: bool = False
    position: int = 0
    checkpoints: tuple[str, ...] = ()
    samples: tuple[Path, ...] = field(default=())
    chosen: str = ""

    @property
    def is_active(self) -> bool:
        """Whether its process lives."""
        return self.state in RUNNING_STATES

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
        """The words that call the subject."""
        token, word = self.settings.get("token") or "", self.settings.get("class_word") or ""
        known = self.progress.get("trigger") or self.facts.get("trigger")
        return str(known or f"{token} {word}".strip())

    @property
    def base(self) -> str:
        """The base model."""
        return str(self.settings.get("pretrained_model_name_or_path") or self.facts.get("base", ""))

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
    folders = [workspace.root / job for job in ids_in(workspace.root)]
    waiting = sorted(
        (folder for folder in folders if is_waiting(folder)),
        key=lambda path: read_json(path / JOB).get("queued", 0.0),
    )
    places = {folder.name: place for place, folder in enumerate(waiting, start=1)}
    jobs = (read_job(folder, now, places.get(folder.name, 0)) for folder in reversed(folders))
    return tuple(job for job in jobs if job is not None)


def read_job(folder: Path, now: float | None = None, position: int = 0) -> Job | None:
    """One job; None if the folder holds none."""
    facts = read_json(folder / JOB)
    if not facts:
        return None
    # In this order: a worker writes its result before it ends.
    alive = worker_of(folder) is not None
    result, progress = read_json(folder / RESULT), read_json(folder / PROGRESS)
    state, cause = _state(folder, facts, result, alive)
    metrics = read_metrics(folder)
    settings = _settings(folder / SETTINGS)
    step = int(metrics[-1]["step"]) if metrics else 0
    total = int(progress.get("total_steps") or settings.get("max_train_steps") or 0)
    if facts.get("kind") != "train":
        step, total = int(progress.get("done", 0)), int(progress.get("total", 0))
    checkpoints = _checkpoints(folder)
    recent = [float(record["seconds"]) for record in metrics[-20:]]
    return Job(
        id=folder.name,
        folder=folder,
        kind=str(facts.get("kind")),
        title=str(facts.get("title")),
        state=state,
        facts=facts,
        settings=settings,
        progress=progress,
        result=result,
        cause=cause,
        step=step,
        total=total,
        step_seconds=statistics.median(recent) if recent else None,
        may_kill=may_kill(folder, time.time() if now is None else now),
        position=position,
        checkpoints=checkpoints,
        samples=_samples(folder),
        chosen=_chosen(folder, checkpoints, state),
    )


def _state(
    folder: Path, facts: Mapping[str, Any], result: Mapping[str, Any], alive: bool
) -> tuple[str, str]:
    """State and cause. A result wins over a process, which wins over the queue."""
    if not result:
        if alive:
            return ("stopping" if stop_asked(folder) is not None else "running"), ""
        return ("waiting", "") if is_waiting(folder) else ("crashed", last_error(folder) or _KILLED)
    code = result.get("code")
    if code == 0:
        wrong = _unusable_result(folder, facts)
        return ("failed", wrong) if wrong else ("done", "")
    if code is None:
        return "crashed", last_error(folder) or _KILLED
    if isinstance(code, int) and code > 128:
        return "stopped", ""
    return "failed", last_error(folder) or "it failed without saying why; the log may help"


def _unusable_result(folder: Path, facts: Mapping[str, Any]) -> str:
    """Why a job that says it is done is not: its result must be there, and open."""
    if facts.get("kind") == "merge":
        return "" if Path(str(facts.get("output"))).exists() else "the merged model is gone"
    if facts.get("kind") != "train":
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


def result_adapter(folder: Path) -> Path | None:
    """The adapter file that a finished run left."""
    names = ("pytorch_lora_weights.safetensors", "dora_kohya.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def adapter_of(job: Job, name: str = "") -> Path | None:
    """The adapter that stands for a run, or another one of its by name."""
    name = name or job.stands
    if name == RESULT_NAME:
        return result_adapter(job.folder) if job.state == "done" else None
    return result_adapter(job.folder / name) if name in job.checkpoints else None


def _chosen(folder: Path, checkpoints: tuple[str, ...], state: str) -> str:
    """What was chosen, if it still is there."""
    name = read_json(folder / CHOSEN).get("checkpoint")
    there = name in checkpoints or (name == RESULT_NAME and state == "done")
    return str(name) if there else ""


def _checkpoints(folder: Path) -> tuple[str, ...]:
    """Names of complete checkpoints with an adapter, oldest first."""
    found = [
        (int(match[1]), path.name)
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and result_adapter(path)
    ]
    return tuple(name for _, name in sorted(found))


def _samples(folder: Path) -> tuple[Path, ...]:
    """Sample pictures: the final ones first, then by step from the newest."""
    samples = folder / "samples"
    final = [samples / f"{name}.png" for name in ("adapted", "base")]
    steps = sorted(samples.glob("step-*.png"), reverse=True)
    return tuple(path for path in [*final, *steps] if path.is_file())


def read_metrics(folder: Path) -> tuple[dict[str, Any], ...]:
    """The steps' records that are whole. Of a file that has grown, only what is new is read."""
    path = folder / "metrics.jsonl"
    try:
        with _METRICS_LOCK, path.open("rb") as file:
            known = _METRICS.pop(path, None) or _Metrics()
            _METRICS[path] = known.follow(file)
            while len(_METRICS) > _MOST_METRICS:
                del _METRICS[next(iter(_METRICS))]
            return _METRICS[path].records
    except OSError:
        return ()


@dataclass(frozen=True)
class _Metrics:
    """Records of a file up to ``end``, and its line that ends there."""

    records: tuple[dict[str, Any], ...] = ()
    end: int = 0
    last: bytes = b""

    def follow(self, file: IO[bytes]) -> _Metrics:
        """These records with those that were added; all anew if a resumed run has cut the file."""
        file.seek(self.end - len(self.last))
        if file.read(len(self.last)) != self.last:
            file.seek(0)
            return _Metrics().follow(file)
        records, end, last = [], self.end, self.last
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break  # half written
            if not line.endswith(b"\n"):
                break
            records.append(record)
            end, last = end + len(line), line
        return _Metrics((*self.records, *records), end, last) if records else self


_METRICS: dict[Path, _Metrics] = {}
_METRICS_LOCK = threading.Lock()
_MOST_METRICS = 64


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        return _yaml(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=512)
def _yaml(path: Path, modified: int) -> Mapping[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def log_tail(folder: Path, lines: int = 40) -> str:
    """The last lines of a job's log; of a progress bar, its latest state."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A bar returns to the start of its line: what was there before is overwritten.
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def log_warnings(folder: Path) -> tuple[str, ...]:
    """What the latest attempt of a job has warned of, each once."""
    try:
        facts = (folder / LOG).stat()
    except OSError:
        return ()
    return _warnings(folder / LOG, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=128)
def _warnings(log: Path, modified: int, size: int) -> tuple[str, ...]:
    with log.open("rb") as file:
        text = file.read(_WARNINGS_BYTES).decode("utf-8", errors="replace")
    lines = text.rpartition("\n--- ")[2].replace("\r", "\n").splitlines()
    found = (line.removeprefix("warning: ") for line in lines if line.startswith("warning: "))
    return tuple(dict.fromkeys(found))


def last_error(folder: Path) -> str:
    """The cause that the log ends with: its last ``error:`` line, or a traceback's last line."""
    # Only of the latest attempt.
    text = log_tail(folder, 400).rpartition("\n--- ")[2]
    tail = text.splitlines()
    for line in reversed(tail):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if "Traceback (most recent call last)" in text and tail:
        return f"unexpected error, please report it with the log: {tail[-1]}"
    return ""
