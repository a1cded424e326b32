"""Checkpoints: when they are due, what stays of them, how a run is extended, and full disks."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.config import ConfigError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training import saving
from dora_diffusion.training.checkpoint import checkpoints_in
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.loop import train
from dora_diffusion.training.saving import CheckpointSaver
from dora_diffusion.training.step import TrainingStep
from tests.training.helpers import assert_same_adapter, make_config, names, no_room, same


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def saver(tmp_path: Path):
    """A saver on a clock of its own, with a state of one number."""
    clock = Clock()

    def make(**changes):
        settings = {"every_steps": 100, "every_minutes": 5.0, "limit": None, **changes}
        made = CheckpointSaver(tmp_path, clock=clock, **settings)
        state = {"parameters": {"a": torch.ones(2)}}

        def write_adapter(folder: Path) -> None:
            (folder / "adapter").write_bytes(b"1234")

        made.put = lambda step, **kind: made.save(step, state, write_adapter, **kind)
        made.clock = clock
        return made

    return make


def test_one_in_between_is_due_after_minutes_and_counts_from_the_last(saver):
    one = saver()
    one.clock.now = 299.9
    assert not one.is_overdue()
    one.clock.now = 300.0
    assert one.is_overdue()
    one.put(40, interim=True)
    assert not one.is_overdue()
    one.clock.now = 599.0
    one.put(100)
    one.clock.now = 898.0
    assert not one.is_overdue()
    assert [step for step in range(1, 301) if one.is_due(step)] == [100, 200, 300]


@pytest.mark.parametrize("changes", [{"every_steps": 0}, {"every_minutes": 0.0}])
def test_none_is_due_where_it_is_turned_off(saver, changes):
    one = saver(**changes)
    one.clock.now = 1e9
    assert not one.is_overdue()


def test_one_in_between_goes_when_the_next_is_there_and_never_costs_one_that_stays(saver, tmp_path):
    one = saver(limit=1)
    one.put(100)
    one.put(140, interim=True)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-140"]
    one.put(180, interim=True)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-180"]
    one.put(200)
    assert names(tmp_path) == ["checkpoint-200"]


def test_one_in_between_is_known_as_such_by_the_next_process(saver, tmp_path):
    path = saver().put(140, interim=True)
    after = saver()
    state = torch.load(path / "training_state.pt", weights_only=True)
    after.resume_from(path, interim=state["interim"])
    after.put(200)
    assert names(tmp_path) == ["checkpoint-200"]


def test_a_run_that_crashes_has_lost_minutes(tiny_run, tmp_path, monkeypatch):
    """A step of two minutes each: the newest checkpoint is at most five minutes and a step old."""
    clock = Clock()
    monkeypatch.setattr(saving.CheckpointSaver.__init__, "__kwdefaults__", {"clock": clock})

    real = TrainingStep.__call__

    def two_minutes(self, step):
        clock.now += 120
        if step == 8 and self.config.output_dir.endswith("c"):
            raise RuntimeError("power cut")
        return real(self, step)

    monkeypatch.setattr(TrainingStep, "__call__", two_minutes)
    whole = tiny_run(max_train_steps=9, checkpointing_steps=1000, output_dir=str(tmp_path / "w"))
    train(whole)
    crashed = replace(whole, output_dir=str(tmp_path / "c"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(crashed)
    assert names(tmp_path / "c") == ["checkpoint-6"], "after 6 minutes, and again after 12"
    monkeypatch.setattr(TrainingStep, "__call__", real)
    train(replace(crashed, resume_from_checkpoint="latest"))
    assert same(tmp_path / "w", tmp_path / "c")
    assert names(tmp_path / "c") == ["checkpoint-9"]


# Full disks


def test_a_disk_without_room_costs_the_checkpoint_and_not_the_run(tiny_run, tmp_path, monkeypatch):
    """Its space is seen before anything is written; the adapter alone is small."""
    expected = train(tiny_run(output_dir=str(tmp_path / "whole"))).adapter
    config = tiny_run(checkpointing_steps=2, max_train_steps=4)
    no_room(monkeypatch, 100_000)
    with pytest.warns(
        UserWarning, match=r"no checkpoint at step 2: it takes 1\.\d MB, and the disk"
    ):
        result = train(config)
    assert (result.steps, result.checkpoint) == (4, None)
    assert same(result.adapter, expected)
    assert checkpoints_in(tmp_path / "out") == []
    assert names(tmp_path / "out") == ["checkpoint-4"], "the newest adapter is enough"
    assert same(tmp_path / "out" / "checkpoint-4", expected)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_a_file_that_may_not_grow_costs_the_checkpoint_and_not_the_run(tiny_run, tmp_path):
    """A real limit of the system: no file may have more than so many bytes (as a quota does)."""
    resource = pytest.importorskip("resource")
    config = tiny_run(checkpointing_steps=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The adapter has some 70 kB, the state with its two moments more than twice of that.
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, before[1]))
    try:
        with pytest.warns(
            UserWarning, match=r"no checkpoint at step 2.*only the adapter was saved"
        ):
            result = train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_adapter(result.adapter).layers
    assert checkpoints_in(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".training.lock"]


def test_a_full_disk_keeps_the_earlier_checkpoint_and_says_where_to_resume(
    tiny_run, tmp_path, monkeypatch, capsys
):
    from dora_diffusion.commands.train import stopped_line

    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            no_room(monkeypatch, 0)
            signal.raise_signal(signal.SIGTERM)

    config = tiny_run(checkpointing_steps=2, max_train_steps=50)
    with pytest.warns(UserWarning, match=r"the newest is checkpoint-2"):
        result = train(config, stop)
    assert result.checkpoint == tmp_path / "out" / "checkpoint-2"
    line = stopped_line(result)
    assert line.startswith(f"stopped at step {result.steps} of 50; ")
    assert line.endswith("--resume_from_checkpoint latest resumes from checkpoint-2")


def test_checkpoints_are_limited_and_load(sd1_folder, photos, tmp_path):
    config = make_config(
        sd1_folder, photos, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=2
    )
    train(config)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert_same_adapter(tmp_path / "out", tmp_path / "out" / "checkpoint-4")


def test_a_full_disk_keeps_the_last_checkpoint(sd1_folder, photos, tmp_path, monkeypatch):
    config = make_config(sd1_folder, photos, tmp_path / "out", checkpointing_steps=2)
    train(config)
    kept = read_adapter(tmp_path / "out" / "checkpoint-4")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=6))
    monkeypatch.undo()
    assert set(read_adapter(tmp_path / "out" / "checkpoint-4").layers) == set(kept.layers)
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".training.lock"]
