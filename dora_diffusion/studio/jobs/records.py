"""The files of a job's folder: what each holds, with one reader and one writer.

::

    job.json      the arguments of a command, and what the page says of it
    settings.yaml the training settings, which ``train --config`` takes
    worker.json   pid and start time of the process that works on it
    progress.json what the work is doing
    STOP          asks the worker to save and leave
    result.json   exit code and times; written when the worker ends in an orderly way
    chosen.json   the checkpoint that was selected for a training run, where one was
    log.txt       all that the worker printed
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dora_diffusion.cli.console.tables import shown_command
from dora_diffusion.cli.settings import JOBS
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.studio.jobs.workspace import DamagedFile, read_object, write_json

JOB, SETTINGS, WORKER, PROGRESS = "job.json", "settings.yaml", "worker.json", "progress.json"
STOP, RESULT, LOG, CHOSEN = "STOP", "result.json", "log.txt", "chosen.json"
STOPPED_CODE = 128 + signal.SIGTERM
# The commands that a job may run, and what the page says of one that runs.
KINDS = {"train": "training", **{name: kind.job.state for name, kind in JOBS.items() if kind.job}}
# Progress that changes often is written twice a second at most.
_PROGRESS_SECONDS = 0.5
Record = TypeVar("Record")
# Of records: a text is not a number, and a number is finite.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class JobRecord:
    """A command to run, and what the page says of it; times in seconds since 1970.

    Attributes:
        arguments: Of ``dora-diffusion``: the command, then its flags.
        title: What the page calls it.
        run: Id of the run that it is about; empty for one of its own.
        base: The base model.
        output: What it makes, which must be there in the end; a run's is known.
        trigger: Trigger words of what it makes; a run tells its own.
        sample: The project's sample that a run learns, if any.
        created: When it was asked for.
        queued: When it was last put at the end of the queue.
    """

    __pydantic_config__ = STRICT
    arguments: Sequence[str]
    title: str = ""
    run: str = ""
    base: str = ""
    output: str = ""
    trigger: str = ""
    sample: str = ""
    created: float = 0.0
    queued: float = 0.0

    @property
    def kind(self) -> str:
        """The command's name."""
        return self.arguments[0] if self.arguments else ""

    @property
    def command(self) -> str:
        """The line that runs, with the threads that it has: others may round otherwise."""
        lines = [["python", "-m", "dora_diffusion", *self.arguments]]
        return shown_command(lines, "OMP_NUM_THREADS=1" if is_embedded(self.base) else "")


def train_arguments(folder: Path, *, resume: bool = False) -> list[str]:
    """Return the arguments that train with the settings of a job's folder."""
    words = ["train", "--config", str(folder / SETTINGS)]
    if not resume:
        return words
    if any(folder.glob("checkpoint-*/training_state.pt")):
        return [*words, "--resume_from_checkpoint", "latest"]
    # There is nothing to resume from, and nothing to lose.
    return [*words, "--overwrite_output_dir"]


@dataclass(frozen=True)
class JobProgress:
    """Progress of the work: in training, from the step after ``first_step`` on.

    Its result is that of ``result_step``. Other work counts what is ``done`` in its ``unit``.
    ``address`` is where it was published.
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
    address: str = ""


@dataclass(frozen=True)
class JobResult:
    """Result of the work: exit code (None: it was killed, or crashed), times, peaks in GiB."""

    __pydantic_config__ = STRICT
    code: int | None = None
    started: float | None = None
    finished: float = 0.0
    peak_memory: float | None = None
    peak_gpu_memory: float | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds that it took; None where it never began."""
        return None if self.started is None else self.finished - self.started


def write_record(folder: Path, record: JobRecord) -> None:
    write_json(folder / JOB, {"kind": record.kind, **dataclasses.asdict(record)})


def read_record(folder: Path) -> JobRecord:
    """Read job.json.

    Raises:
        DamagedFile: If it is missing, cannot be read, or is of an unknown kind.
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
    """Read result.json; None where there is none.

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
    """Writer of progress.json: what the page cannot read from the trainer's own files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._progress = JobProgress()
        self._written = 0.0

    def __call__(self, **figures: Any) -> None:
        """Change fields of `JobProgress`; counts, which change often, are not written each time."""
        self._progress = dataclasses.replace(self._progress, **figures)
        now, is_count = time.monotonic(), figures.keys() == {"done", "total"}
        is_last = self._progress.done >= self._progress.total
        if not is_count or is_last or now - self._written > _PROGRESS_SECONDS:
            write_json(self._path, dataclasses.asdict(self._progress))
            self._written = now


@cache
def _reader(kind: type[Any]) -> TypeAdapter[Any]:
    """Return the reader of a dataclass: made once, since every refresh reads every job's."""
    return TypeAdapter(kind)


def checked(kind: type[Record], values: Mapping[str, Any], path: Path) -> Record:
    """A dataclass from a file's values: what is missing has its default, what is more is left out.

    Raises:
        DamagedFile: If one is missing that has no default, or is not of its field's type.
    """
    try:
        made: Record = _reader(kind).validate_json(json.dumps(values))  # type: ignore[arg-type]
        return made
    except ValidationError as error:
        first = error.errors()[0]
        place, given = ".".join(map(str, first["loc"])), str(first["input"])[:80]
        what = "is missing" if first["type"] == "missing" else f"is {given!r}"
        raise DamagedFile(path, f"{place} {what}") from error
