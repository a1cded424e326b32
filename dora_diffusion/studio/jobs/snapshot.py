"""Jobs as shown on the page, read from the runs folder alone, and their adapters."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dora_diffusion import config
from dora_diffusion.cli.console.errors import explain
from dora_diffusion.config.base import BaseModel
from dora_diffusion.evaluation.ranking import Ranking
from dora_diffusion.formats.adapter.metadata import join_triggers
from dora_diffusion.formats.files import runs
from dora_diffusion.studio.jobs import queue, records, store
from dora_diffusion.studio.jobs.store import DamagedFile, UserError, Workspace

Part = TypeVar("Part")
_REMOVE = ", or remove this run"
# Cache of ended jobs by folder, with the state of their files: there are many, and few change.
_ENDED: dict[Path, tuple[object, Job]] = {}
_KILLED = "the process ended unexpectedly (killed, or the machine ran out of memory); "


@dataclass(frozen=True)
class Job:
    """One job, read from its folder.

    Attributes:
        folder: Folder of the job.
        record: The requested command.
        state: ``"waiting"``, ``"running"``, ``"stopping"``, ``"done"``, ``"stopped"``,
            ``"failed"``, ``"crashed"``, or ``"damaged"`` if its record cannot be read.
        settings: Training settings (settings.yaml).
        progress: The worker's last report.
        result: Exit code and times; None before the end.
        cause: Reason of a failure or crash, in one line with the fix.
        damage: A line for each damaged file.
        step: Optimizer steps done; for other jobs, a count in their own unit.
        total: Number of steps, or total of that count; 0 while unknown.
        step_seconds: Median time of the latest steps; None before the first.
        may_kill: True if the job still runs long after a request to stop.
        position: Position in the queue from 1; 0 if the job does not wait.
        checkpoints: Names of complete checkpoints, oldest first.
        samples: Sample images: final ones first, then newest first.
        chosen: The selected adapter: a checkpoint, ``"result"``, or ``""``.
    """

    folder: Path
    record: records.JobRecord
    state: str
    settings: Mapping[str, Any]
    progress: records.JobProgress
    result: records.JobResult | None
    cause: str = ""
    damage: tuple[str, ...] = ()
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
        return self.folder.name

    @property
    def made(self) -> str:
        """Time of the request, from its id: ``2026-11-25 16:03``."""
        return store.made_at(self.id)

    @property
    def kind(self) -> str:
        """The command that runs, one of `records.KINDS`."""
        return self.record.kind

    @property
    def title(self) -> str:
        """Name on the page."""
        return self.record.title

    @property
    def label(self) -> str:
        """Name in a long list: the title with the date, and with the time if it lacks it."""
        is_timed = self.title.endswith(self.made[11:])
        return f"{self.title} · {self.made[5:10] if is_timed else self.made[5:]}"

    @property
    def is_active(self) -> bool:
        """True if the job's process is alive."""
        return self.state in ("running", "stopping")

    @property
    def has_ended(self) -> bool:
        """True if the job neither waits nor runs."""
        return not self.is_active and self.state != "waiting"

    @property
    def shown_state(self) -> str:
        """State on the page: ``"damaged"`` if an ended job has damaged files, else the state."""
        return "damaged" if self.damage and self.has_ended else self.state

    @property
    def remaining_seconds(self) -> float | None:
        """Time for the remaining steps at the measured pace; None if unknown."""
        if self.step_seconds is None or not self.total:
            return None
        return (self.total - self.step) * self.step_seconds

    @property
    def trigger(self) -> str:
        entries = self.settings.get("dataset_config") or [self.settings]
        words = ((e.get("token") or "", e.get("class_word") or "") for e in entries)
        named = join_triggers(" ".join(pair).strip() for pair in words)
        return self.record.trigger or self.progress.trigger or named

    @property
    def base(self) -> str:
        return str(self.settings.get("pretrained_model_name_or_path") or self.record.base)

    @property
    def base_model(self) -> BaseModel:
        """The base model with the settings it was loaded with."""
        return BaseModel.of_settings({**self.settings, "base": self.base})

    @property
    def stands(self) -> str:
        """The selected adapter, else the result, else the newest checkpoint."""
        last = self.checkpoints[-1] if self.checkpoints else ""
        return self.chosen or (runs.RESULT_NAME if self.has_result else last)

    @property
    def has_result(self) -> bool:
        """True if a finished run has an adapter; full fine-tuning has none."""
        return self.kind == "train" and self.state == "done" and not runs.pipeline_in(self.folder)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The run's adapters that can be ranked and selected."""
        return runs.candidates(self.checkpoints, self.result_step if self.has_result else None)

    @property
    def result_step(self) -> int:
        """Steps of the result; fewer than `step` if the run kept its best checkpoint."""
        return self.progress.result_step or self.step

    def step_of(self, name: str) -> int:
        """Return the number of training steps of a checkpoint or the result."""
        return (
            self.result_step if name == runs.RESULT_NAME else int(name.removeprefix("checkpoint-"))
        )


def snapshot(runs_dir: Path) -> tuple[Job, ...]:
    """Return all jobs, newest first, from the current files and processes."""
    workspace = Workspace(runs_dir)
    positions = {folder: n for n, folder in enumerate(queue.waiting_jobs(workspace), start=1)}
    folders = workspace.job_folders[::-1]
    for folder in _ENDED.keys() - {*folders}:
        _ENDED.pop(folder, None)
    jobs = (read_job(folder, positions.get(folder, 0)) for folder in folders)
    return tuple(job for job in jobs if job is not None)


def read_job(folder: Path, position: int = 0) -> Job | None:
    """Read a job; None if its folder was deleted. An unreadable job gets the state ``"damaged"``.

    Ended jobs are cached until one of their files changes.
    """
    stamp = _stamp(folder)
    cached_stamp, ended = _ENDED.get(folder, (None, None))
    if ended is not None and cached_stamp == (stamp, _has_output(ended.record)):
        return ended
    try:
        job = _read_job(folder, position)
    except Exception as error:  # One bad folder must not hide the other jobs.
        line = explain(error)[1] or f"this run cannot be read ({error!r})"
        record = records.JobRecord(("train",), title="Damaged run")
        nothing = records.JobProgress()
        job = Job(folder, record, "damaged", {}, nothing, None, damage=(f"{line}{_REMOVE}",))
    if stamp is not None and job.result is not None and not job.damage:
        _ENDED[folder] = (stamp, _has_output(job.record)), job
    # If the folder was deleted meanwhile, its missing files would look like a crash.
    return job if folder.exists() else None


def _stamp(folder: Path) -> tuple[object, ...] | None:
    """Return a value that changes with the files of a job; None if the folder cannot be read.

    It also changes when a file is added to a subfolder or removed from it.
    """
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return tuple((name, of.st_mtime_ns, of.st_size, of.st_ino) for name, of in files)


def _has_output(record: records.JobRecord) -> bool:
    return not record.output or Path(record.output).exists()


def _read_job(folder: Path, position: int) -> Job:
    damage: list[str] = []

    def whole(read: Callable[[Path], Part], otherwise: Part) -> Part:
        try:
            return read(folder)
        except DamagedFile as error:
            damage.append(f"{error}{_REMOVE}")
            return otherwise

    record = records.read_record(folder)
    # The order matters: a worker writes its result before it ends. Two passes, because it may start
    # after the first check.
    for _ in range(2):
        alive = queue.worker_of(folder) is not None
        result = whole(records.read_result, None)
        waits = queue.is_waiting(folder)
        if alive or waits or result is not None or damage:
            break
    state, cause = _state(folder, record, result, alive, waits)
    if damage:
        cause = ""  # The job did end normally.
    progress = whole(records.read_progress, records.JobProgress())
    settings: Mapping[str, Any] = whole(_settings, {})
    whole(records.check_metrics, None)
    metrics = records.read_metrics(folder)
    step, total = progress.done, progress.total
    if record.kind == "train":
        step = int(metrics[-1]["step"]) if metrics else 0
        total = int(progress.total_steps or settings.get("max_train_steps") or 0)
    checkpoints = runs.adapter_checkpoints(folder)
    names = (*checkpoints, *([runs.RESULT_NAME] if state == "done" else []))
    chosen = store.read_json(folder / records.CHOSEN).get("checkpoint")
    recent = [float(line["seconds"]) for line in metrics[-20:]]
    return Job(
        folder=folder,
        record=record,
        state=state,
        settings=settings,
        progress=progress,
        result=result,
        cause=cause,
        damage=tuple(damage),
        step=step,
        total=total,
        step_seconds=statistics.median(recent) if recent else None,
        may_kill=queue.may_kill(folder),
        position=position,
        checkpoints=checkpoints,
        samples=_samples(folder),
        chosen=str(chosen) if chosen in names else "",
    )


def read_run(workspace: Workspace, job_id: object) -> Job:
    """Read a job by its id.

    Raises:
        UserError: If the job does not exist.
    """
    job = read_job(workspace.job(job_id))
    if job is None:
        raise store.MissingError("this run no longer exists; choose another one")
    return job


def _state(
    folder: Path,
    record: records.JobRecord,
    result: records.JobResult | None,
    alive: bool,
    waits: bool,
) -> tuple[str, str]:
    """Return state and cause. A result takes precedence over a process, and that over the queue."""
    if result is None:
        if alive:
            return ("stopping" if queue.stop_asked(folder) is not None else "running"), ""
        if waits:
            return "waiting", ""
    elif result.code == 0:
        wrong = _unusable_result(folder, record)
        return ("failed", wrong) if wrong else ("done", "")
    elif result.code is not None and result.code > 128:
        return "stopped", ""
    cause = records.last_error(folder)
    if result is None or result.code is None:
        is_run = record.kind == "train"
        end = "Resume continues from the last checkpoint" if is_run else "start it again"
        return "crashed", cause or f"{_KILLED}{end}"
    return "failed", cause or "it failed without saying why; the log may help"


def _unusable_result(folder: Path, record: records.JobRecord) -> str:
    """Return why a job with exit code 0 has no usable result; empty if it exists and opens."""
    if record.kind != "train":
        return "" if _has_output(record) else f"{Path(record.output).name} is gone"
    if runs.pipeline_in(folder):  # the model itself was trained
        return ""
    file = runs.result_adapter(folder)
    if file is None:
        return "the run ended without an adapter file"
    return _opens(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _opens(file: Path, modified: int) -> str:
    """Open an adapter and return the error, if any; cached until the file changes."""
    from dora_diffusion.formats.adapter.inspect import report_on

    try:
        report_on(file)
    except (ValueError, OSError) as error:
        return f"its adapter file cannot be opened: {error}"
    return ""


def _samples(folder: Path) -> tuple[Path, ...]:
    """Return the sample images: final ones first, then steps from the newest."""
    samples = folder / "samples"
    final = [samples / f"{name}.png" for name in ("adapted", "base")]
    steps = sorted(samples.glob("step-*.png"), reverse=True)
    return tuple(path for path in [*final, *steps] if path.is_file())


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings of a run in their types; settings of other versions are unchanged."""
    path = folder / records.SETTINGS
    try:
        values = _yaml(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}
    if isinstance(values, str):
        raise DamagedFile(path, values)
    return values


@functools.lru_cache(maxsize=512)
def _yaml(path: Path, modified: int) -> Mapping[str, Any] | str:
    """Return the settings, or the error as text. Both are cached, because reading is slow."""
    known = {one.name: one for one in config.settings()}
    try:
        values = {
            name: known[name].cast(value) if name in known else value
            for name, value in config.read_config_file(path).items()
        }
    except (ValueError, RecursionError) as error:
        return str(error).replace(str(path), path.name)
    return values or "it is empty"


def choose(job: Job, name: object) -> int:
    """Select a checkpoint as the run's adapter for Generate and Library. Returns its step.

    Raises:
        UserError: If the checkpoint does not exist.
    """
    if not isinstance(name, str) or name not in {*job.candidates, *job.checkpoints}:
        raise UserError("this checkpoint no longer exists; choose another one")
    store.write_json(job.folder / records.CHOSEN, {"checkpoint": name})
    return job.step_of(name)


def adapter_of(job: Job, name: str = "") -> Path | None:
    """Return the path of a run's selected adapter, or of another one by name."""
    name = name or job.stands
    if name == runs.RESULT_NAME:
        return runs.result_adapter(job.folder) if job.has_result else None
    return runs.result_adapter(job.folder / name) if name in job.checkpoints else None


def chosen_adapter(job: Job, checkpoint: str = "") -> Path:
    """Return the path of a run's selected adapter, or of a checkpoint.

    Raises:
        UserError: If the adapter does not exist.
    """
    path, fine_tuned = adapter_of(job, checkpoint), runs.pipeline_in(job.folder)
    if path is None and fine_tuned:
        raise UserError(
            f"this run fine-tuned the model itself, which is in {fine_tuned}; it has no adapter. "
            "Train offers it as a base model; for images, 'dora-diffusion generate --base MODEL "
            "--prompt PROMPT --output IMAGES'"
        )
    if path is None:
        raise UserError("this run has no adapter yet; wait until it is done, or take a checkpoint")
    return path


def read_ranking(workspace: Workspace, job: Job) -> Ranking | None:
    """Read the ranking of a run's checkpoints; None if they were not ranked.

    Raises:
        DamagedFile: If comparison.json cannot be read.
    """
    path = workspace.ranking(job.id) / runs.COMPARISON
    values = store.read_object(path)
    if values is None:
        return None
    ranking = records.checked(Ranking, values, path)
    steps = {name: job.step_of(name) for name in (*job.candidates, *job.checkpoints)}
    steps[runs.BASE_NAME], rows = 0, []
    for row in ranking.rows:
        if row.name in steps:
            images = tuple(path.parent / image for image in row.images)
            rows.append(replace(row, images=images, step=steps[row.name]))
    measured = {row.name for row in rows}
    missing = tuple(name for name in job.candidates if name not in measured)
    return replace(ranking, rows=tuple(rows), missing=missing)
