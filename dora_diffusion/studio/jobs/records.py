"""The files of a job's folder, each with one reader and one writer.

::

    job.json      the arguments of a command, and its description on the page
    settings.yaml the training settings, for ``train --config``
    worker.json   pid and start time of the worker's process
    progress.json current phase and counts
    STOP          requests that the worker save and exit
    result.json   exit code and times; written when the worker exits normally
    chosen.json   the checkpoint selected for a training run (optional)
    log.txt       the worker's output
    metrics.jsonl the losses of a training run, written by the trainer
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dora_diffusion.cli.console.errors import asking_for_report
from dora_diffusion.cli.console.output import shown_command
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.studio.jobs.store import DamagedFile, read_object, write_json

JOB, SETTINGS, WORKER, PROGRESS = "job.json", "settings.yaml", "worker.json", "progress.json"
STOP, RESULT, LOG, CHOSEN = "STOP", "result.json", "log.txt", "chosen.json"
STOPPED_CODE = 128 + signal.SIGTERM
KINDS: Mapping[str, str] = {
    "train": "training", "export": "merging", "convert": "converting",
    "rank-checkpoints": "ranking", "prepare": "looking at photos",
}  # fmt: skip
"""The commands that a job may run, each with the state that the page shows meanwhile."""
# Frequent progress is written at most twice a second.
_PROGRESS_SECONDS = 0.5
_LOG_BYTES = 60_000
_WARNINGS_BYTES = 4_000_000
# Start of the line that a worker prints first in each attempt.
_NEW_ATTEMPT = "\n--- "
_METRICS_NAME = "metrics.jsonl"
Record = TypeVar("Record")
# Records: strings are not converted to numbers, and numbers are finite.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class JobRecord:
    """A command to run, and its description on the page; times in seconds since 1970.

    Attributes:
        arguments: Arguments of ``dora-diffusion``: the command, then its flags.
        title: Name on the page.
        run: Id of the run that the job processes; empty if the job is a run itself.
        base: The base model.
        output: Path of the result, which must exist in the end; empty for a training run.
        trigger: Trigger words of the result; empty for a training run.
        sample: The bundled sample subject that a run learns, if any.
        owner: Name of the user who queued the job; empty if the app has no logins.
        created: Time of the request.
        queued: Time when the job was last appended to the queue.
    """

    __pydantic_config__ = STRICT
    arguments: Sequence[str]
    title: str = ""
    run: str = ""
    base: str = ""
    output: str = ""
    trigger: str = ""
    sample: str = ""
    owner: str = ""
    created: float = 0.0
    queued: float = 0.0

    @property
    def kind(self) -> str:
        """The command's name."""
        return self.arguments[0] if self.arguments else ""

    @property
    def command(self) -> str:
        """The command line, with the number of threads: rounding may depend on it."""
        lines = [["python", "-m", "dora_diffusion", *self.arguments]]
        return shown_command(lines, "OMP_NUM_THREADS=1" if is_embedded(self.base) else "")


def train_arguments(folder: Path, *, resume: bool = False) -> list[str]:
    """Return the arguments of ``train`` for the settings in a job's folder."""
    words = ["train", "--config", str(folder / SETTINGS)]
    if not resume:
        return words
    if any(folder.glob("checkpoint-*/training_state.pt")):
        return [*words, "--resume_from_checkpoint", "latest"]
    # There is nothing to resume from, and nothing to lose.
    return [*words, "--overwrite_output_dir"]


@dataclass(frozen=True)
class JobProgress:
    """Progress of a job.

    Training starts after ``first_step`` and keeps the result of ``result_step``. Other jobs count
    ``done`` of ``total`` in their ``unit``.
    """

    __pydantic_config__ = STRICT
    phase: str = ""
    device_name: str = ""
    first_step: int | None = None
    total_steps: int = 0
    trigger: str = ""
    result_step: int = 0
    unit: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class JobResult:
    """Result of a job: exit code (None: killed or crashed), times, peak memory in GiB."""

    __pydantic_config__ = STRICT
    code: int | None = None
    started: float | None = None
    finished: float = 0.0
    peak_memory: float | None = None
    peak_gpu_memory: float | None = None

    @property
    def seconds(self) -> float | None:
        """Duration in seconds; None if the job never started."""
        return None if self.started is None else self.finished - self.started


def write_record(folder: Path, record: JobRecord) -> None:
    write_json(folder / JOB, {"kind": record.kind, **dataclasses.asdict(record)})


def read_record(folder: Path) -> JobRecord:
    """Read job.json.

    Raises:
        DamagedFile: If the file is missing or cannot be read, or its kind is unknown.
    """
    path = folder / JOB
    values = read_object(path)
    if values is None:
        raise DamagedFile(path, "it is missing")
    record = checked(JobRecord, values, path)
    if record.kind not in KINDS:
        raise DamagedFile(path, f"kind is {record.kind[:80]!r}, not {', '.join(KINDS)}")
    return record


def write_result(folder: Path, result: JobResult) -> None:
    write_json(folder / RESULT, dataclasses.asdict(result))


def read_result(folder: Path) -> JobResult | None:
    """Read result.json; None if it does not exist.

    Raises:
        DamagedFile: If it cannot be read.
    """
    values = read_object(folder / RESULT)
    return None if values is None else checked(JobResult, values, folder / RESULT)


def read_progress(folder: Path) -> JobProgress:
    """Read progress.json.

    Raises:
        DamagedFile: If it cannot be read.
    """
    return checked(JobProgress, read_object(folder / PROGRESS) or {}, folder / PROGRESS)


class ProgressFile:
    """Writer of progress.json, for progress that is not in the trainer's own files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._progress = JobProgress()
        self._written = 0.0

    def __call__(self, **figures: Any) -> None:
        """Change fields of `JobProgress`. Counts change often and are not written each time."""
        self._progress = dataclasses.replace(self._progress, **figures)
        now, is_count = time.monotonic(), figures.keys() == {"done", "total"}
        is_last = self._progress.done >= self._progress.total
        if not is_count or is_last or now - self._written > _PROGRESS_SECONDS:
            write_json(self._path, dataclasses.asdict(self._progress))
            self._written = now


@cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    """Return the reader of a dataclass, cached because every refresh reads every job."""
    return TypeAdapter(kind)


def checked(kind: type[Record], values: Mapping[str, Any], path: Path) -> Record:
    """Create a dataclass from a file's values. Unknown values are ignored.

    Raises:
        DamagedFile: If a value without a default is missing, or a value has the wrong type.
    """
    try:
        record: Record = _reader(kind).validate_json(json.dumps(values))  # type: ignore[arg-type]
        return record
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(map(str, first["loc"])), str(first["input"])[:80]
        problem = "is missing" if first["type"] == "missing" else f"is {value!r}"
        raise DamagedFile(path, f"{field} {problem}") from error


@dataclass
class _Metrics:
    """The complete lines of a growing metrics.jsonl.

    Attributes:
        records: Records of the steps and of held-out photos.
        damaged: Number of the first line that is not a record; 0 if there is none.
    """

    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    damaged: int = 0
    lines: int = 0
    end: int = 0
    last: bytes = b""

    def follow(self, file: IO[bytes]) -> None:
        """Read the new lines, or all lines if a resumed run truncated the file."""
        file.seek(self.end - len(self.last))
        if file.read(len(self.last)) != self.last:
            file.seek(0)
            vars(self).update(vars(_Metrics()))
        for line in file:
            if not line.endswith(b"\n"):
                break  # incomplete
            self.lines, self.end, self.last = self.lines + 1, self.end + len(line), line
            record = _whole_record(line)
            if record is not None:
                self.records.append(record)
            else:
                self.damaged = self.damaged or self.lines


_metrics_of = functools.lru_cache(maxsize=64)(lambda path: _Metrics())
_METRICS_LOCK = threading.Lock()


def _follow(folder: Path) -> tuple[tuple[dict[str, Any], ...], int]:
    """Read the new records; return all of a run's records, and the number of a damaged line."""
    path = folder / _METRICS_NAME
    with _METRICS_LOCK, path.open("rb") as file:
        metrics: _Metrics = _metrics_of(path)
        metrics.follow(file)
        return tuple(metrics.records), metrics.damaged


def _records(folder: Path) -> tuple[dict[str, Any], ...]:
    try:
        return _follow(folder)[0]
    except OSError:
        return ()


def read_metrics(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the complete records of steps."""
    return tuple(record for record in _records(folder) if "loss" in record)


def read_validation(folder: Path) -> dict[int, float]:
    """Return a run's validation losses by step; step 0 is the base model."""
    name = "validation_loss"
    return {record["step"]: record[name] for record in _records(folder) if record.get(name)}


def check_metrics(folder: Path) -> None:
    """Check that a run's metrics can be read; the last line may be incomplete.

    Raises:
        DamagedFile: If the file, or one of its lines, cannot be read.
    """
    path = folder / _METRICS_NAME
    try:
        damaged = _follow(folder)[1]
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedFile(path, error.strerror) from error
    if damaged:
        raise DamagedFile(path, f"line {damaged} is not a record of a step, and is skipped")


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """Parse a record with the numbers that the page shows; None for any other line.

    Records of held-out photos have other numbers; non-finite ones are omitted.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = (record.get("loss"), record.get("seconds"))
    is_whole = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)  # type: ignore[arg-type]
    is_validation = any(name.startswith("validation_") for name in record)
    return record if is_whole or is_validation else None


def log_tail(folder: Path, lines: int = 40) -> str:
    """Return the last lines of a job's log, with each progress bar in its latest state."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A progress bar returns to the start of its line and overwrites it.
    visible = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in visible if line.strip()][-lines:])


def log_warnings(folder: Path) -> tuple[str, ...]:
    """Return the distinct warnings of a job's latest attempt."""
    try:
        status = (folder / LOG).stat()
        return _warnings(folder / LOG, status.st_mtime_ns, status.st_size)
    except OSError:
        return ()


@functools.lru_cache(maxsize=128)
def _warnings(log: Path, modified: int, size: int) -> tuple[str, ...]:
    with log.open("rb") as file:
        text = file.read(_WARNINGS_BYTES).decode("utf-8", errors="replace")
    lines = text.rpartition(_NEW_ATTEMPT)[2].replace("\r", "\n").splitlines()
    warned = (line.removeprefix("warning: ") for line in lines if line.startswith("warning: "))
    return tuple(dict.fromkeys(warned))


def printed(folder: Path) -> list[str]:
    """Return the output lines of a job's latest attempt, without warnings."""
    # The first line is the attempt's heading.
    lines = f"\n{log_tail(folder, 100)}".rpartition(_NEW_ATTEMPT)[2].splitlines()[1:]
    return [line for line in lines if not line.startswith("warning: ")]


def last_error(folder: Path) -> str:
    """Return the last ``error:`` line of a job's log, or the last line of a traceback."""
    text = log_tail(folder, 400).rpartition(_NEW_ATTEMPT)[2]
    lines = text.splitlines()
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if "Traceback (most recent call last)" in text and lines:
        return asking_for_report(lines[-1])
    return ""
