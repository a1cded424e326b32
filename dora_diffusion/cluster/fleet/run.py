"""A fleet: training of many subjects on workers, each with its own adapter, and a page of all."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dora_diffusion.cli.console.output import say, tell
from dora_diffusion.cluster.fleet.cluster import RayWorkers
from dora_diffusion.cluster.fleet.connection import Share
from dora_diffusion.cluster.fleet.queue import Task, TaskReport, Work, Workers, WorkQueue, run_tasks
from dora_diffusion.cluster.fleet.results import (
    DONE,
    FAILED,
    PAGE_FILE,
    RECORDS_FILE,
    RUNNING,
    FleetResults,
    SubjectRecord,
    cause_of,
    done_before,
    fleet_page,
    records_text,
    settings_digest,
)
from dora_diffusion.cluster.fleet.subject import FleetSubject, train_subjects
from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.fields import require, require_positive
from dora_diffusion.config.wording import counted, duration
from dora_diffusion.training.inputs.dataset import list_subjects
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.pack import check_pack

# Settings that the fleet sets itself for each subject.
_ITS_OWN = ("resume_from_checkpoint", "push_to_hub")
_READERS = 16
# Most rows of running subjects in the table.
_ROWS = 20
_REDRAW_SECONDS = 0.5
# Number of recent packs that are checked for room.
_OPEN_PACKS = 8


@dataclass
class Fleet:
    """Progress of a fleet.

    Attributes:
        output: Folder or URL of the results.
        records: Records of ended subjects by name.
        known: Names of subjects that were done before.
        unlisted: Records in the output of subjects that this call does not list.
        queue: Queue of the remaining subjects.
        workers: The workers.
        files: Paths of the records and the page by name.
    """

    output: str
    queue: WorkQueue
    workers: Workers
    records: dict[str, SubjectRecord] = field(default_factory=dict)
    known: frozenset[str] = frozenset()
    unlisted: Mapping[str, SubjectRecord] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[SubjectRecord]:
        """The subjects that failed, each with its cause."""
        return [record for record in self.records.values() if record.status == FAILED]


OnChange = Callable[[Fleet, SubjectRecord | None], None]
"""Callback for regular updates, with the record of a subject that has just ended, or None."""


def workers_for(work: Work, address: str | None, share: Share | None = None) -> Workers:
    """Return the workers: this process, or actors of a Ray cluster at an address."""
    if address is None:
        return Workers(work)
    return RayWorkers(work, address, share or Share())


def run_fleet(
    configs: Mapping[str, TrainConfig | ConfigError],
    output: str | PathLike[str],
    address: str | None = None,
    share: Share | None = None,
    *,
    retries: int = 3,
    pack: int = 1,
    on_change: OnChange = lambda fleet, ended: None,
) -> Fleet:
    """Train an adapter for each of many subjects, except for subjects that are already done.

    If a worker or node is lost, another worker resumes its subject from the last checkpoint. A
    failed subject is recorded with its cause. ``fleet.jsonl`` has all records, ``index.html`` the
    images, including those of subjects that only earlier calls listed.

    Args:
        configs: Settings of each subject by name, or the error in them
            (`config.subject_list.subject_configs`). Results are in OUTPUT/NAME.
        output: A folder shared by all workers, or an fsspec URL such as ``s3://bucket/shop``.
        address: A Ray cluster: ``"local"``, ``"auto"``, HOST:PORT or ray://HOST:PORT. Default: one
            subject after another in this process.
        share: Share of a node for each worker.
        retries: Number of further workers for a subject whose worker is lost.
        pack: Most subjects that a worker trains at once, if their settings allow it.
        on_change: Called regularly with the fleet.

    Raises:
        ConfigError: If Ray is not installed, the address does not answer, a worker does not fit on
            any node, or another fleet writes to ``output``.
        OSError: If ``output`` is not writable.

    Example:
        >>> config = TrainConfig(
        ...     instance_data_dir="samples/bolt_mug", instance_prompt="a photo of a sks mug",
        ...     max_train_steps=2, num_validation_images=0)
        >>> fleet = run_fleet({"mug": config}, "demo-output/doctest-fleet")
        >>> fleet.records["mug"].status
        'done'
    """
    require_positive("pack", pack)
    output = url if "://" in (url := fspath(output)) else str(Path(url).expanduser().absolute())
    results = FleetResults(output)
    fleet = Fleet(output, WorkQueue(retries), workers_for(train_subjects, address, share))
    with results.locked():
        ended, left = _sorted_out(configs, results, output)
        fleet.known = frozenset(name for name, record in ended.items() if record.status == DONE)
        fleet.unlisted = {n: r for n, r in results.records().items() if n not in configs}
        fleet.queue.add(_packed(left, pack))
        recorder = _Recorder(fleet, results, list(configs), on_change)
        try:
            for record in ended.values():
                recorder.end(record)
            if left:
                changed = partial(on_change, fleet, None)
                run_tasks(fleet.queue, fleet.workers, recorder.end_task, changed)
        finally:
            recorder.write()
        fleet.files["page"] = results.write(PAGE_FILE, _page(configs, fleet))
    return fleet


def _page(configs: Iterable[str], fleet: Fleet) -> str:
    """Return the page of all subjects, those of this call first."""
    return fleet_page([*configs, *fleet.unlisted], {**fleet.unlisted, **fleet.records})


@dataclass(frozen=True)
class _Recorder:
    """Writes the records of a fleet."""

    fleet: Fleet
    results: FleetResults
    names: Sequence[str]
    on_change: OnChange

    def end(self, record: SubjectRecord) -> None:
        """Record a subject that has ended."""
        self.fleet.records[record.name] = record
        self.on_change(self.fleet, record)
        # With thousands of subjects the file is not written each time.
        if len(self.fleet.records) % max(1, len(self.names) // 100) == 0:
            self.write()

    def end_task(self, done: TaskReport) -> None:
        """Record the subjects of a task, with facts from the queue."""
        records: list[SubjectRecord] = done.value or [
            replace(subject.record, status=FAILED, cause=cause_of(done.error or RuntimeError()))
            for subject in done.task.payload
        ]
        for record in records:
            completed = replace(
                record,
                attempts=done.attempts,
                seconds=round(done.seconds, 3),
                worker=done.location.worker,
                node=done.location.node,
            )
            if completed.status == DONE:
                self.results.save(completed)
            self.end(completed)

    def write(self) -> None:
        """Write all records, in the order of the subjects, then those of unlisted subjects."""
        known = self.fleet.records
        records = [known[name] for name in self.names if name in known]
        records += self.fleet.unlisted.values()
        self.fleet.files["records"] = self.results.write(RECORDS_FILE, records_text(records))


def _packed(subjects: Sequence[FleetSubject], size: int) -> list[Task]:
    """Group subjects into packs of at most ``size``, in order. Returns a task for each."""
    packs: list[list[FleetSubject]] = []
    for subject in subjects:
        room = (p for p in packs[-_OPEN_PACKS:] if len(p) < size and _fits(subject, p[0]))
        if (pack := next(room, None)) is not None:
            pack.append(subject)
        else:
            packs.append([subject])
    return [
        Task(", ".join(subject.record.name for subject in pack), tuple(pack), len(pack))
        for pack in packs
    ]


def _fits(subject: FleetSubject, other: FleetSubject) -> bool:
    try:
        check_pack({one.record.name: one.config for one in (other, subject)})
    except ConfigError:
        return False
    return True


def _sorted_out(
    configs: Mapping[str, TrainConfig | ConfigError], results: FleetResults, output: str
) -> tuple[dict[str, SubjectRecord], list[FleetSubject]]:
    """Return the records of done and invalid subjects, and the subjects to train."""
    run, ended, left = secrets.token_hex(8), dict[str, SubjectRecord](), list[FleetSubject]()
    with ThreadPoolExecutor(_READERS) as pool:
        stored = {name: pool.submit(results.record, name) for name in configs}
    for name, config in configs.items():
        record = SubjectRecord(name, RUNNING, run=run)
        try:
            if isinstance(config, ConfigError):
                raise config
            record = replace(record, settings=config.to_dict())
            for setting in _ITS_OWN:
                problem = f"{setting} is set by the fleet; leave it out"
                require(not getattr(config, setting), problem, setting)
            # Checks that do not need the model.
            list_subjects(subjects_of(config))
            record = replace(record, digest=settings_digest(config))
            done = done_before(stored[name].result(), record, config)
            if done is None:
                # Absolute paths, because a worker has another working directory.
                paths = {s.name: absolute(getattr(config, s.name)) for s in settings() if s.is_path}
                left.append(FleetSubject(replace(config, **paths), output, record))
        except (ValueError, OSError) as error:
            done = replace(record, status=FAILED, cause=cause_of(error))
        if done is not None:
            ended[name] = done
    return ended, left


def absolute(value: Any) -> Any:
    """Return an existing path as an absolute path, also inside a list of entries."""
    if isinstance(value, list):
        return [{key: absolute(item) for key, item in entry.items()} for entry in value]
    path = Path(value).expanduser() if isinstance(value, str) and value else None
    return str(path.absolute()) if path is not None and path.exists() else value


class FleetTable:
    """Table of a fleet's progress.

    Args:
        is_terminal: True if lines can be overwritten. Default: True if standard error is a
            terminal.
        clock: Returns a time in seconds.
    """

    def __init__(
        self, is_terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._clock = clock
        self._drawn = self._lost = 0
        self._last = -_REDRAW_SECONDS
        self._warned: set[str] = set()

    def __call__(self, fleet: Fleet, ended: SubjectRecord | None) -> None:
        """Display the fleet, and a subject that has just ended."""
        lost = fleet.queue.lost[self._lost :]
        if ended is not None or lost:
            self.close()
        for report in lost:
            say(f"lost: {report.task.name}: {report.lost}; it is resumed", sys.stderr)
        self._lost += len(lost)
        if ended is not None:
            self._say_end(fleet, ended)
        total = len(fleet.records) + sum(fleet.queue.sizes)
        tell(phase="training subjects", unit="subject", done=len(fleet.records), total=total)
        if self._is_terminal and (ended or self._clock() - self._last >= _REDRAW_SECONDS):
            self.close()
            lines = table_lines(fleet)
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()
            self._drawn, self._last = len(lines), self._clock()

    def close(self) -> None:
        """Clear the table."""
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _say_end(self, fleet: Fleet, record: SubjectRecord) -> None:
        for text in set(record.warnings) - self._warned:  # Most are about common settings.
            self._warned.add(text)
            name = f"{record.name}: " if record.pack == 1 else ""  # A pack shares its warnings.
            say(f"warning: {name}{text}", sys.stderr)
        if record.status == FAILED:
            say(f"failed: {record.name}: {record.cause}", sys.stderr)
        elif record.name not in fleet.known:
            again = f", {counted(record.attempts, 'worker')}" if record.attempts > 1 else ""
            took = duration(record.seconds)
            say(f"done: {record.name} in {took}{again} ({record.worker})", sys.stderr)


def table_lines(fleet: Fleet) -> list[str]:
    """Return the counts, and a row for each running subject with step, loss and worker."""
    queue, failed = fleet.queue, len(fleet.failed)
    running, waiting = queue.sizes
    counts = [
        f"{len(fleet.records) - failed} done" + (
            f" ({len(fleet.known)} before)" if fleet.known else ""
        ),
        f"{running} running",
        f"{waiting} waiting",
        f"{failed} failed",
    ]  # fmt: skip
    if queue.per_hour is not None:
        counts += [f"{queue.per_hour:.0f} an hour", f"{duration(queue.seconds_left)} left"]
    lines, steps = [", ".join(counts)], fleet.workers.progress()
    for name, task in list(queue.running.items())[:_ROWS]:
        text, step = "starting", steps.get(name)
        if step is not None:
            text = f"step {step.step} of {step.total_steps}, loss {step.loss:.4f}"
        lines.append(f"  {name}: {text} ({task.location.worker})")
    if len(queue.running) > _ROWS:
        lines.append(f"  and {len(queue.running) - _ROWS} more")
    return lines
