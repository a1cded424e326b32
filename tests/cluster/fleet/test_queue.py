"""The queue, with workers that are lost as a test says, and a clock of its own."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.cluster.fleet.queue import (
    Task,
    TaskReport,
    WorkerLocation,
    WorkQueue,
    run_tasks,
)
from dora_diffusion.training.metrics import TrainingError


class ScriptedWorkers:
    """Each start of a task ends as its script says: "done", "error", or "lost"."""

    def __init__(self, count: int, script: dict[str, list[str]]) -> None:
        self.count, self.script = count, script
        self.busy: list[Task] = []
        self.started: list[str] = []
        self.most = 0
        self.left = False
        self.on_progress = lambda: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.left = True

    def idle(self, waiting):
        return self.count - len(self.busy)

    def start(self, task):
        self.busy.append(task)
        self.started.append(task.name)
        self.most = max(self.most, len(self.busy))
        return WorkerLocation("a worker")

    def wait(self):
        task = self.busy.pop(0)
        what = self.script[task.name].pop(0)
        location = WorkerLocation("a worker", "a node")
        if what == "lost":
            return [TaskReport(task, location, lost="its node is gone")]
        error = ValueError("no photos") if what == "error" else None
        return [TaskReport(task, location, value=None if error else task.payload, error=error)]

    def progress(self):
        return {}


def run(count, script, retries=3):
    queue, workers, ended = WorkQueue(retries), ScriptedWorkers(count, script), []
    queue.add(Task(name, name.upper()) for name in script)
    run_tasks(queue, workers, ended.append)
    assert workers.left
    return {one.task.name: one for one in ended}, workers, queue


def test_a_task_whose_worker_is_lost_comes_first_again_and_one_that_fails_does_not():
    script = {"a": ["lost", "lost", "done"], "b": ["error"], "c": ["done"]}
    ended, workers, queue = run(1, script)
    assert workers.started == ["a", "a", "a", "b", "c"]
    assert [(e.attempts, e.value) for e in ended.values()] == [(3, "A"), (1, None), (1, "C")]
    assert str(ended["b"].error) == "no photos"
    assert queue.ended == 3


def test_a_task_that_loses_too_many_workers_fails_with_the_last_reason():
    ended, _, _ = run(1, {"a": ["lost"] * 3, "b": ["done"]}, retries=2)
    assert isinstance(ended["a"].error, TrainingError)
    assert str(ended["a"].error) == "3 workers that had it were lost: its node is gone"
    assert ended["b"].error is None


@given(
    count=st.integers(1, 4),
    script=st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=3),
        st.lists(st.just("lost"), max_size=3).flatmap(
            lambda lost: st.sampled_from([[*lost, "done"], [*lost, "error"]])
        ),
        max_size=12,
    ),
)
def test_every_task_ends_once_whatever_is_lost(count, script):
    wanted = {name: (len(outcomes), outcomes[-1]) for name, outcomes in script.items()}
    ended, workers, queue = run(count, {name: list(o) for name, o in script.items()})
    assert {name: (e.attempts, "error" if e.error else "done") for name, e in ended.items()} == (
        wanted
    )
    assert Counter(workers.started) == {name: tries for name, (tries, _) in wanted.items()}
    assert workers.most <= count
    assert queue.is_done


def test_a_task_takes_since_its_first_worker():
    now = [100.0]
    queue, workers = WorkQueue(clock=lambda: now[0]), ScriptedWorkers(1, {"a": ["lost", "done"]})
    queue.add([Task("a", None)])
    for seconds in (7, 5):
        queue.start(workers)
        now[0] += seconds
        (report,) = workers.wait()
        ended = queue.settle(report)
    assert ended is not None
    assert ended.seconds == 12


def test_what_the_caller_raises_dismisses_the_workers():
    def refuse(ended: TaskReport) -> None:
        raise RuntimeError(ended.task.name)

    queue, workers = WorkQueue(), ScriptedWorkers(1, {"a": ["done"]})
    queue.add([Task("a", None)])
    with pytest.raises(RuntimeError, match=r"^a$"):
        run_tasks(queue, workers, refuse)
    assert workers.left
