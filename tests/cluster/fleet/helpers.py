"""Workers that end where a test wants it, and what a fleet's results are compared by.

Workers on a cluster import this module.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from dora_diffusion.cluster.fleet.queue import Worker
from dora_diffusion.cluster.fleet.results import SubjectRecord
from dora_diffusion.cluster.fleet.subject import FleetSubject, train_subjects
from dora_diffusion.training.events import StepDone

SAMPLES = Path(__file__).parents[3] / "samples"
NAMES = ("bolt_mug", "ring_robot", "heart_teapot")
DEADLY, STEP = "ring_robot", 3


def _train(
    subjects: Sequence[FleetSubject], worker: Worker, at_step: Callable[[str, int], None]
) -> list[SubjectRecord]:
    """As `train_subjects`, with a call before each step is reported."""
    (subject,) = subjects
    report = worker.report

    def report_later(step: StepDone) -> None:
        at_step(subject.record.name, step.step)
        report(step)

    worker.report = report_later
    try:
        return train_subjects(subjects, worker)
    finally:
        worker.report = report


def _die_once(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(subjects: Sequence[FleetSubject], worker: Worker) -> list[SubjectRecord]:
    """The process is killed at a step of one subject, once."""

    def at_step(name: str, step: int) -> None:
        if name == DEADLY and step == STEP:
            _die_once(Path(subjects[0].output, "killed"))

    return _train(subjects, worker, at_step)


def train_and_die_often(subjects: Sequence[FleetSubject], worker: Worker) -> list[SubjectRecord]:
    """The process is killed at some moment after each of several steps of every subject."""

    def at_step(name: str, step: int) -> None:
        drawn = random.Random(name)
        for death in drawn.sample(range(1, 25), 3):
            mark, delay = Path(subjects[0].output, f"killed-{name}-{death}"), drawn.uniform(0, 0.1)
            if step == death:
                threading.Timer(delay, _die_once, (mark,)).start()

    return _train(subjects, worker, at_step)


def train_and_take_the_node_along(
    subjects: Sequence[FleetSubject], worker: Worker
) -> list[SubjectRecord]:
    """The raylet is killed that has started the process, once, if its node is the one named.

    Ray takes seconds to tell of it, and leaves the process alone.
    """

    def at_step(name: str, step: int) -> None:
        import ray

        top = Path(subjects[0].output).parent
        is_victim = ray.get_runtime_context().get_node_id() == (top / "victim").read_text("utf-8")
        mark = top / "killed"
        if step == STEP and is_victim and not mark.exists():
            mark.write_text(name, encoding="utf-8")
            os.kill(os.getppid(), signal.SIGKILL)

    return _train(subjects, worker, at_step)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def assert_same_results(ours: Path, theirs: Path, names: tuple[str, ...] = NAMES) -> None:
    """Adapters and losses of every subject are equal bit for bit."""
    for name in names:
        own, other = (
            load_file(top / name / "pytorch_lora_weights.safetensors") for top in (ours, theirs)
        )
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name
        assert losses(ours / name) == losses(theirs / name), name
