"""A fleet's table: counts, pace, and a row for each subject that runs."""

from __future__ import annotations

import pytest

from dora_diffusion.cluster.fleet.queue import Task, TaskReport, WorkerLocation, WorkQueue
from dora_diffusion.cluster.fleet.results import SubjectRecord
from dora_diffusion.cluster.fleet.run import Fleet, FleetTable, table_lines
from dora_diffusion.training.events import StepDone


class Workers:
    """Workers that only report their steps."""

    def __init__(self, steps):
        self.steps = steps

    def start(self, task):
        return WorkerLocation("node-1:42", "node-1")

    def progress(self):
        return self.steps


@pytest.fixture
def fleet():
    """One known, one done, one failed in 60 seconds; two run, one waits."""
    now = [0.0]
    queue = WorkQueue(clock=lambda: now[0])
    workers = Workers({"c": StepDone(3, 40, 0.125, {})})
    queue.add(Task(name, None) for name in "abcde")
    for _ in range(4):
        queue.start(workers)
    now[0] = 60
    tasks = {name: running.task for name, running in queue.running.items()}
    for name, error in (("a", None), ("b", ValueError("no photos"))):
        queue.settle(TaskReport(tasks[name], WorkerLocation(), error=error))
    records = {
        "old": SubjectRecord("old", "done"),
        "a": SubjectRecord("a", "done", seconds=60, worker="node-1:42", warnings=("idle",)),
        "b": SubjectRecord("b", "failed", cause="no photos", warnings=("idle",)),
    }
    return Fleet("out", queue, workers, records, frozenset(["old"]))


def test_the_table_counts_and_says_what_runs(fleet):
    assert table_lines(fleet) == [
        "2 done (1 before), 2 running, 1 waiting, 1 failed, 120 an hour, 1 min 30 s left",
        "  c: step 3 of 40, loss 0.1250 (node-1:42)",
        "  d: starting (node-1:42)",
    ]


def test_in_a_log_each_subject_is_a_line_and_a_warning_is_said_once(fleet, capsys):
    show = FleetTable(is_terminal=False)
    for name in ("old", "a", "b"):
        show(fleet, fleet.records[name])
    fleet.queue.lost.append(TaskReport(Task("c", None), WorkerLocation(), lost="its node is gone"))
    show(fleet, None)
    show.close()
    assert capsys.readouterr().err.splitlines() == [
        "warning: a: idle",
        "done: a in 1 min 0 s (node-1:42)",
        "failed: b: no photos",
        "lost: c: its node is gone; it is resumed",
    ]


def test_on_a_terminal_the_table_is_drawn_over(fleet, capsys):
    now = [0.0]
    show = FleetTable(is_terminal=True, clock=lambda: now[0])
    show(fleet, None)
    show(fleet, None)  # too soon to be drawn again
    assert capsys.readouterr().err.count("\n") == 3
    now[0] = 1.0
    show(fleet, None)
    assert capsys.readouterr().err.startswith("\x1b[3F\x1b[J2 done")
    show.close()
    assert capsys.readouterr().err == "\x1b[3F\x1b[J"
