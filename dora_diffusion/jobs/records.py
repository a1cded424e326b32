"""The files of a job's folder: what each holds, with one reader and one writer.

::

    job.json      what was asked for
    settings.yaml the training settings (``dora-diffusion train --config`` takes the same file)
    worker.json   pid and start time of the process that works on it
    progress.json what the work is doing
    STOP          asks the worker to save and leave
    result.json   exit code and times; written when the worker ends in an orderly way
    chosen.json   the checkpoint that stands for a training run, where one was chosen
    log.txt       all that the worker printed
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from dora_diffusion.jobs.errors import DamagedFile
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.workspace import read_object, write_json

JOB, SETTINGS, WORKER, PROGRESS = "job.json", "settings.yaml", "worker.json", "progress.json"
STOP, RESULT, LOG, CHOSEN = "STOP", "result.json", "log.txt", "chosen.json"
STOPPED_CODE = 128 + signal.SIGTERM
# Progress that changes often is written twice a second at most.
_PROGRESS_SECONDS = 0.5
Record = TypeVar("Record")


@dataclass(frozen=True)
class TrainRequest:
    """Train on the job's photos, as its settings say.

    ``subject`` is the id of what they show, ``sample`` the project's sample that it is, if any.
    """

    kind: ClassVar[str] = "train"
    run: ClassVar[str] = ""
    base: str = ""
    subject: str = ""
    sample: str = ""


@dataclass(frozen=True)
class MergeRequest:
    """Merge a run's adapter file into its base model, as one file.

    ``vae`` to ``revision`` say how the base is loaded, see `ModelFiles`.
    """

    kind: ClassVar[str] = "merge"
    run: str = ""
    base: str = ""
    adapter: str = ""
    output: str = ""
    strength: float = 1.0
    trigger: str = ""
    vae: str | None = None
    config: str | None = None
    variant: str | None = None
    revision: str | None = None

    @property
    def files(self) -> ModelFiles:
        """How the base is loaded."""
        return ModelFiles(self.vae, self.config, self.variant, self.revision)


@dataclass(frozen=True)
class CompareRequest:
    """Compare these checkpoints of a run."""

    kind: ClassVar[str] = "compare"
    run: str = ""
    base: str = ""
    checkpoints: Sequence[str] = ()


@dataclass(frozen=True)
class PushRequest:
    """Publish a run on the hub as ``NAME/MODEL``; private: only its owner can see it."""

    kind: ClassVar[str] = "push"
    base: ClassVar[str] = ""
    run: str = ""
    repository: str = ""
    private: bool = True


@dataclass(frozen=True)
class AnalyzeRequest:
    """Say what a run did to the weights of its base, in a folder of files.

    ``variant`` and ``revision`` say how the base is loaded, see `ModelFiles`.
    """

    kind: ClassVar[str] = "analyze"
    run: str = ""
    base: str = ""
    output: str = ""
    variant: str | None = None
    revision: str | None = None


JobRequest = Union[  # noqa: UP007
    TrainRequest, MergeRequest, CompareRequest, PushRequest, AnalyzeRequest
]
_REQUESTS: Mapping[str, type[JobRequest]] = {kind.kind: kind for kind in get_args(JobRequest)}


@dataclass(frozen=True)
class JobRecord:
    """What was asked for, and when, in seconds since 1970.

    ``queued`` is when it was last put at the end of the queue. ``resume`` continues from the latest
    checkpoint.
    """

    request: JobRequest
    title: str = ""
    created: float = 0.0
    queued: float = 0.0
    resume: bool = False


@dataclass(frozen=True)
class JobProgress:
    """What the work is doing: in training, from the step after ``first_step`` on.

    Other work counts what is ``done`` in a unit of its own. ``address`` is where it was published.
    """

    phase: str = ""
    device_name: str = ""
    first_step: int | None = None
    total_steps: int = 0
    trigger: str = ""
    done: int = 0
    total: int = 0
    address: str = ""


@dataclass(frozen=True)
class JobResult:
    """How the work ended: exit code (None: it was killed, or crashed), times, peaks in GiB."""

    code: int | None = None
    started: float | None = None
    finished: float = 0.0
    peak_memory: float | None = None
    peak_gpu_memory: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took; None where it never began."""
        return None if self.started is None else self.finished - self.started


def write_record(folder: Path, record: JobRecord) -> None:
    """Write job.json: one flat object, with the kind of the request."""
    values = dataclasses.asdict(record)
    write_json(folder / JOB, {"kind": record.request.kind} | values.pop("request") | values)


def read_record(folder: Path) -> JobRecord:
    """Read job.json.

    Raises:
        DamagedFile: If it is missing, cannot be read, or is of an unknown kind.
    """
    path = folder / JOB
    values = read_object(path)
    if values is None:
        raise DamagedFile(path, "it is missing")
    kind = _REQUESTS.get(str(values.get("kind")))
    if kind is None:
        known = ", ".join(_REQUESTS)
        raise DamagedFile(path, f"kind is {str(values.get('kind'))[:80]!r}, not {known}")
    return _of(JobRecord, values | {"request": _of(kind, values, path)}, path)


def write_result(folder: Path, result: JobResult) -> None:
    """Write result.json."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def read_result(folder: Path) -> JobResult | None:
    """Read result.json; None where there is none.

    Raises:
        DamagedFile: If it cannot be read.
    """
    values = read_object(folder / RESULT)
    return None if values is None else _of(JobResult, values, folder / RESULT)


def read_progress(folder: Path) -> JobProgress:
    """Read progress.json.

    Raises:
        DamagedFile: If it cannot be read.
    """
    return _of(JobProgress, read_object(folder / PROGRESS) or {}, folder / PROGRESS)


class ProgressFile:
    """Keeps progress.json: what the page cannot read from the trainer's own files."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS
        self._progress = JobProgress()
        self._written = 0.0

    def __call__(self, *, often: bool = False, **changes: Any) -> None:
        """Change fields of `JobProgress`; those that change often are not written each time."""
        self._progress = dataclasses.replace(self._progress, **changes)
        now = time.monotonic()
        if not often or now - self._written > _PROGRESS_SECONDS:
            write_json(self._path, dataclasses.asdict(self._progress))
            self._written = now


def _of(kind: type[Record], values: Mapping[str, Any], path: Path) -> Record:
    """A record from a file's values: what is missing has its default, what is more is left out."""
    types = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if name in names}
    for name, value in given.items():
        if not _fits(value, types[name]):
            raise DamagedFile(path, f"{name} is {str(value)[:80]!r}")
    return kind(**given)


def _fits(value: object, wanted: Any) -> bool:
    """Whether a value of a JSON file is of a field's type."""
    if get_origin(wanted) is Sequence:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if get_origin(wanted) is not None:  # X | None, and the union of requests
        return any(_fits(value, one) for one in get_args(wanted))
    if isinstance(value, bool):
        return wanted is bool
    if wanted in (int, float) and isinstance(value, (int, float)):
        return math.isfinite(value) and (wanted is float or value == int(value))
    return isinstance(value, wanted)
