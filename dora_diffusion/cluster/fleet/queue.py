"""Tasks that wait, run and have ended: what is done next, and again; workers in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from dora_diffusion.config.fields import require
from dora_diffusion.models.load import BaseCache
from dora_diffusion.training.metrics import TrainingError


@dataclass(frozen=True)
class Task:
    """Work to be done by any worker.

    Attributes:
        name: What it is called; no two have one name.
        payload: What the work is given; it can be pickled.
        size: What it counts for, such as its subjects.
    """

    name: str
    payload: Any
    size: int = 1


@dataclass(frozen=True)
class WorkerLocation:
    """Location of a task: the worker, and the node that it is on."""

    worker: str = ""
    node: str = ""


@dataclass(frozen=True)
class TaskReport:
    """Report of the workers on a task.

    Attributes:
        task: The task.
        location: Where it runs, or ran last.
        value: What the work returned.
        error: What it raised, or that its workers were lost.
        lost: Why its worker is gone, where it is; the task may be done by another one.
        attempts: How many workers had it, once it will not be done again.
        seconds: Since it was first given to one of them.
    """

    task: Task
    location: WorkerLocation
    value: Any = None
    error: Exception | None = None
    lost: str = ""
    attempts: int = 0
    seconds: float = 0.0


class Worker:
    """Context of the work: it stays from one task to the next.

    Args:
        on_progress: Called when the work has told something.

    Attributes:
        load: Loads base models, and keeps the last one.
        waited: Seconds that the present task waited for this worker to start.
        told: What the present task last told of itself.
    """

    def __init__(self, on_progress: Callable[[], None] = lambda: None) -> None:
        self.load = BaseCache()
        self.waited = 0.0
        self.told: dict[str, Any] = {}
        self._on_progress = on_progress

    def tell(self, **figures: Any) -> None:
        """Report the progress of the task."""
        self.told = figures
        self._on_progress()


Work = Callable[[Any, Worker], Any]
"""A function of a module, which workers import: it is given a task's payload."""


class Workers:
    """Workers for tasks: this process, which does a task while it is waited for.

    Those of a cluster are a subclass.

    Args:
        work: What is done with each task's payload.

    Attributes:
        on_progress: Called whenever a task that runs has something to tell.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._task: Task | None = None
        self._worker = Worker(lambda: self.on_progress())
        self.on_progress: Callable[[], None] = lambda: None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._task = None

    def idle(self, waiting: int) -> int:
        """Return how many of the waiting tasks could be started right now."""
        return int(self._task is None)

    def start(self, task: Task) -> WorkerLocation:
        """Start a task on an idle worker."""
        self._task, self._worker.told = task, {}
        return WorkerLocation("this process")

    def wait(self) -> list[TaskReport]:
        """The tasks that ended, after a while of waiting for one; perhaps none did."""
        assert self._task is not None
        report = TaskReport(self._task, WorkerLocation("this process"))
        try:
            report = replace(report, value=self._work(report.task.payload, self._worker))
        except Exception as error:
            report = replace(report, error=error)
        self._task = None
        return [report]

    def progress(self) -> dict[str, Any]:
        """Return the last progress report of each running task, by name."""
        return {} if self._task is None else {self._task.name: self._worker.told}


@dataclass
class WorkQueue:
    """Tasks in their order; those whose worker was lost come first again.

    Attributes:
        retries: How many more workers a task is given when its worker is lost.
        clock: Seconds, from anywhere.
        waiting: Tasks that no worker has.
        running: Tasks that a worker has, by name.
        ended: The sizes of those that ended.
        lost: What was told of workers that are gone, in whose place another one comes.
    """

    retries: int = 3
    clock: Callable[[], float] = time.monotonic
    waiting: deque[Task] = field(default_factory=deque)
    running: dict[str, TaskReport] = field(default_factory=dict)
    ended: int = 0
    lost: list[TaskReport] = field(default_factory=list)
    _attempts: dict[str, int] = field(default_factory=dict)
    _first: dict[str, float] = field(default_factory=dict)
    _begun: float | None = None

    def __post_init__(self) -> None:
        require(self.retries >= 0, f"retries is {self.retries}; it must not be negative", "retries")

    def add(self, tasks: Iterable[Task]) -> None:
        """Append tasks."""
        self.waiting.extend(tasks)

    @property
    def is_done(self) -> bool:
        return not self.waiting and not self.running

    def start(self, workers: Workers) -> None:
        """Start the next task on a worker."""
        task, now = self.waiting.popleft(), self.clock()
        self._begun = now if self._begun is None else self._begun
        self._first.setdefault(task.name, now)
        self._attempts[task.name] = self._attempts.get(task.name, 0) + 1
        self.running[task.name] = TaskReport(task, workers.start(task))

    def settle(self, report: TaskReport) -> TaskReport | None:
        """Record the end of a task and return its report; None if it waits for another worker."""
        task, error = report.task, report.error
        del self.running[task.name]
        attempts = self._attempts[task.name]
        if report.lost and attempts <= self.retries:
            self.waiting.appendleft(task)
            self.lost.append(report)
            return None
        if report.lost:
            error = TrainingError(f"{attempts} workers that had it were lost: {report.lost}")
        self.ended += task.size
        seconds = self.clock() - self._first[task.name]
        return replace(report, error=error, attempts=attempts, seconds=seconds)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of tasks that run, and of those that wait."""
        running = sum(report.task.size for report in self.running.values())
        return running, sum(task.size for task in self.waiting)

    @property
    def per_hour(self) -> float | None:
        """Size that ends in an hour, at the pace so far; None before the first has ended."""
        seconds = 0.0 if self._begun is None else self.clock() - self._begun
        return 3600 * self.ended / seconds if self.ended and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes, at the pace so far; None before the first has ended."""
        pace = self.per_hour
        return None if pace is None else 3600 * sum(self.sizes) / pace


def run_tasks(
    queue: WorkQueue,
    workers: Workers,
    on_end: Callable[[TaskReport], None],
    on_change: Callable[[], None] = lambda: None,
) -> None:
    """Run all waiting tasks on the workers.

    Args:
        queue: The tasks.
        workers: Who does them; they are dismissed at the end, also of an error.
        on_end: Called with each task that ended. What it raises ends everything.
        on_change: Called every while, and when something has changed.
    """
    workers.on_progress = on_change
    with workers:
        while not queue.is_done:
            for _ in range(min(workers.idle(len(queue.waiting)), len(queue.waiting))):
                queue.start(workers)
            on_change()
            for report in workers.wait():
                if (ended := queue.settle(report)) is not None:
                    on_end(ended)
    on_change()
