"""Workers that end where a test wants it, and what a fleet's results are compared by.

Workers on a cluster import this module.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from dora_diffusion.fleet.records import SubjectRecord
from dora_diffusion.fleet.subject import FleetSubject, train_subjects
from dora_diffusion.fleet.workers import Worker

SAMPLES = Path(__file__).parents[2] / "samples"
NAMES = ("bolt_mug", "ring_robot", "heart_teapot")
DEADLY, STEP = "ring_robot", 3


def train_and_die(subjects: Sequence[FleetSubject], worker: Worker) -> list[SubjectRecord]:
    """As `train_subjects`, but the process is killed at a step of one subject, once."""
    (subject,) = subjects
    mark, tell = Path(subject.output, "killed"), worker.tell

    def tell_or_die(**figures: object) -> None:
        if subject.record.name == DEADLY and figures["step"] == STEP and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tell(**figures)

    worker.tell = tell_or_die
    try:
        return train_subjects(subjects, worker)
    finally:
        worker.tell = tell


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
