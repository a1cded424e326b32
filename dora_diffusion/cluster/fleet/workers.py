"""Context of a task's work, and workers that are this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_diffusion.cluster.fleet.queue import Place, Task, TaskReport
from dora_diffusion.models.load import BaseCache


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


class LocalWorkers:
    """One worker, this process: a task is done while it is waited for.

    Args:
        work: What is done with each task's payload.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._task: Task | None = None
        self._worker = Worker(lambda: self.on_progress())
        self.on_progress: Callable[[], None] = lambda: None

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self._task = None

    def idle(self, waiting: int) -> int:
        return int(self._task is None)

    def start(self, task: Task) -> Place:
        self._task, self._worker.told = task, {}
        return Place("this process")

    def wait(self) -> list[TaskReport]:
        assert self._task is not None
        task, place = self._task, Place("this process")
        try:
            report = TaskReport(task, place, value=self._work(task.payload, self._worker))
        except Exception as error:
            report = TaskReport(task, place, error=error)
        self._task = None
        return [report]

    def progress(self) -> dict[str, Any]:
        return {} if self._task is None else {self._task.name: self._worker.told}
