"""Queue of tasks with retries, and the workers that run them; a worker in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from dora_diffusion.config.fields import require
from dora_diffusion.models.load import BaseCache
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.metrics import TrainingError


@dataclass(frozen=True)
class Task:
    """Task for any worker.

    Attributes:
        name: Unique name.
        payload: Argument of the work; must be picklable.
        size: Weight in counts, such as its number of subjects.
    """

    name: str
    payload: Any
    size: int = 1


@dataclass(frozen=True)
class WorkerLocation:
    """Location of a task: the worker and its node."""

    worker: str = ""
    node: str = ""


@dataclass(frozen=True)
class TaskReport:
    """Report on a task.

    Attributes:
        task: The task.
        location: Current or last location.
        value: Result of the work.
        error: Error of the work, or an error about lost workers.
        lost: Reason for the loss of its worker, if any; another worker may take the task.
        attempts: Number of workers that had the task, set at its end.
        seconds: Time since its first start.
    """

    task: Task
    location: WorkerLocation
    value: Any = None
    error: Exception | None = None
    lost: str = ""
    attempts: int = 0
    seconds: float = 0.0


class Worker:
    """Context of the work, which persists between tasks.

    Args:
        on_progress: Called after each step.

    Attributes:
        load: Loads base models, and keeps the last one in memory.
        waited: Seconds that the current task waited for this worker to start.
        step: Last step of the current task; None before it.
    """

    def __init__(self, on_progress: Callable[[], None] = lambda: None) -> None:
        self.load = BaseCache()
        self.waited = 0.0
        self.step: StepDone | None = None
        self._on_progress = on_progress

    def report(self, step: StepDone) -> None:
        """Report a step of the task."""
        self.step = step
        self._on_progress()


Work = Callable[[Any, Worker], Any]
"""Function of a task's payload and the worker; workers import it from its module."""


class Workers:
    """Runs tasks in this process, inside of `wait`; subclasses run them on a cluster.

    Args:
        work: Function of a task's payload.

    Attributes:
        on_progress: Called after each step of a running task.
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
        """Return how many of the waiting tasks can be started now."""
        return int(self._task is None)

    def start(self, task: Task) -> WorkerLocation:
        """Start a task on an idle worker."""
        self._task, self._worker.step = task, None
        return WorkerLocation("this process")

    def wait(self) -> list[TaskReport]:
        """Wait a while for a task to end. Returns the reports of ended tasks, if any."""
        assert self._task is not None
        report = TaskReport(self._task, WorkerLocation("this process"))
        try:
            report = replace(report, value=self._work(report.task.payload, self._worker))
        except Exception as error:
            report = replace(report, error=error)
        self._task = None
        return [report]

    def progress(self) -> dict[str, StepDone | None]:
        """Return the last step of each running task, by name."""
        return {} if self._task is None else {self._task.name: self._worker.step}


@dataclass
class WorkQueue:
    """Queue of tasks in order; tasks of lost workers return to the front.

    Attributes:
        retries: Number of further attempts for a task whose worker is lost.
        clock: Returns a time in seconds.
        waiting: Waiting tasks.
        running: Reports of running tasks by name.
        ended: Total size of ended tasks.
        lost: Reports on lost workers whose task is retried.
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
        """Record the end of a task and return its report; None if the task is retried."""
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
        """Total sizes of running and of waiting tasks."""
        running = sum(report.task.size for report in self.running.values())
        return running, sum(task.size for task in self.waiting)

    @property
    def per_hour(self) -> float | None:
        """Size completed per hour at the pace so far; None before the first task has ended."""
        seconds = 0.0 if self._begun is None else self.clock() - self._begun
        return 3600 * self.ended / seconds if self.ended and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the pace so far; None before the first task has ended."""
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
        workers: The workers; they are stopped at the end, also after an error.
        on_end: Called with the report of each ended task. Its errors end the run.
        on_change: Called regularly, and after each change.
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
