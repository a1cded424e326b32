"""Checkpoints: which there are, when they are due, what stays of them, and full disks."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import (
    STATE_FILE,
    CheckpointSaver,
    checkpoints_in,
    find_checkpoint,
    folders_after,
)
from dora_diffusion.training.step import Step
from tests.refusal import refused
from tests.training.helpers import (
    losses,
    names,
    no_room,
    same,
    steps_in,
)
from tests.waiting import Clock


def test_without_checkpoints_the_advice_does_not_name_one(tiny_run):
    config = tiny_run(checkpointing_steps=0)
    train(config)
    with refused("output_dir", "no checkpoint to resume from", "--overwrite_output_dir") as error:
        train(config)
    assert "resume_from_checkpoint" not in str(error.value)
    with refused("resume_from_checkpoint", "contains no checkpoint"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_checkpoints_are_listed_by_step_and_only_where_they_are_whole(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", ".checkpoint-11.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert [path.name for path in checkpoints_in(tmp_path, after=9)] == ["checkpoint-10"]
    assert [path.name for path in folders_after(tmp_path, 9)] == ["checkpoint-10", "checkpoint-12"]
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    with refused("resume_from_checkpoint", "checkpoint-12 is not a checkpoint"):
        find_checkpoint("checkpoint-12", tmp_path)


class PowerCut(BaseException):
    """Leaves no time to save anything."""


@pytest.fixture
def saver(tmp_path: Path):
    """A saver on a clock of its own, with a state of one number."""
    clock = Clock(0.0)

    def make(**changes):
        settings = {"every_steps": 100, "every_minutes": 5.0, "limit": None, **changes}
        made = CheckpointSaver(tmp_path, clock=clock.monotonic, **settings)
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
    # Those in between were not announced.
    assert one.take_removed() == ("checkpoint-100",)
    one.put(300)
    assert one.take_removed() == ("checkpoint-200",)


def test_one_in_between_is_known_as_such_by_the_next_process(saver, tmp_path):
    path = saver().put(140, interim=True)
    after = saver()
    state = torch.load(path / "training_state.pt", weights_only=True)
    after.resume_from(path, interim=state["interim"])
    after.put(180, interim=True)
    after.put(200)
    assert names(tmp_path) == ["checkpoint-200"]
    assert after.take_removed() == ("checkpoint-140",)


def test_a_run_that_crashes_has_lost_minutes(tiny_run, tmp_path, monkeypatch):
    """A step of two minutes each: the newest checkpoint is at most five minutes and a step old."""
    clock = Clock()
    monkeypatch.setattr(CheckpointSaver.__init__, "__kwdefaults__", {"clock": clock.monotonic})

    real = Step.begin

    def two_minutes(self, step):
        clock.now += 120
        if step == 8 and self.config.output_dir.endswith("c"):
            raise PowerCut
        real(self, step)

    monkeypatch.setattr(Step, "begin", two_minutes)
    whole = tiny_run(max_train_steps=9, checkpointing_steps=1000, output_dir=str(tmp_path / "w"))
    train(whole)
    crashed = replace(whole, output_dir=str(tmp_path / "c"))
    with pytest.raises(PowerCut):
        train(crashed)
    assert names(tmp_path / "c") == ["checkpoint-6"], "after 6 minutes, and again after 12"
    monkeypatch.setattr(Step, "begin", real)
    train(replace(crashed, resume_from_checkpoint="latest"))
    assert same(tmp_path / "w", tmp_path / "c")
    assert names(tmp_path / "c") == ["checkpoint-9"]


# Errors


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_photo_that_disappears_costs_no_step(accumulation, tiny_run, photos, tmp_path):
    """Its steps are saved first; with the photo back, the run is the one that saw it all along."""
    settings = {
        "max_train_steps": 6, "checkpointing_steps": 100, "cache_latents": False,
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    whole = tiny_run(output_dir=str(tmp_path / "whole"), **settings)
    train(whole)
    config, away = tiny_run(**settings), tmp_path / "away"

    def take_away(event):
        if isinstance(event, StepDone) and event.step == 2:
            photos.rename(away)

    saved = r"an error ends the run after step (\d); checkpoint-\1 was saved first"
    with pytest.warns(UserWarning, match=saved), pytest.raises((OSError, ValueError)):
        train(config, take_away)
    (name,) = names(tmp_path / "out")
    step = int(name.rpartition("-")[2])
    assert step in (3, 4)
    assert steps_in(tmp_path / "out") == list(range(1, step + 1))
    away.rename(photos)
    train(replace(config, resume_from_checkpoint="latest"))
    assert same(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-6"], "it was one of those in between"


# Full disks


def test_a_run_stops_where_nothing_can_be_saved_any_more(tiny_run, tmp_path, monkeypatch):
    """At the first checkpoint that fails together with its adapter, with what there is."""
    real = os.fsync

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    seen = []

    def fill(event):
        if isinstance(event, StepDone):
            seen.append(event.step)
            monkeypatch.setattr(os, "fsync", full if event.step >= 3 else real)

    config = tiny_run(checkpointing_steps=2, max_train_steps=20)
    with pytest.raises(
        DiskFullError, match=r"nothing can be saved at step 4: .*\(the newest is checkpoint-2\)"
    ) as error:
        train(config, fill)
    assert "\n" not in str(error.value)
    assert seen == [1, 2, 3, 4]
    assert names(tmp_path / "out") == ["checkpoint-2"]
    monkeypatch.setattr(os, "fsync", real)
    assert train(replace(config, max_train_steps=4, resume_from_checkpoint="latest")).steps == 4


def test_a_disk_without_room_costs_the_checkpoint_and_not_the_run(tiny_run, tmp_path, monkeypatch):
    """Its space is seen before anything is written; the adapter alone is small."""
    expected = train(tiny_run(output_dir=str(tmp_path / "whole"))).adapter
    config = tiny_run(checkpointing_steps=2, max_train_steps=4)
    no_room(monkeypatch, 100_000)
    with pytest.warns(
        UserWarning, match=r"no checkpoint at step 2: it needs 1\.\d MB, but the disk"
    ) as said:
        result = train(config)
    lines = [str(one.message) for one in said if "no checkpoint at step" in str(one.message)]
    assert ["checkpoint-2 was removed to make room" in line for line in lines] == [False, True]
    assert (result.steps, result.checkpoint) == (4, None)
    assert same(result.adapter, expected)
    assert checkpoints_in(tmp_path / "out") == []
    assert names(tmp_path / "out") == ["checkpoint-4"], "the newest adapter is enough"
    assert same(tmp_path / "out" / "checkpoint-4", expected)
    monkeypatch.undo()
    with refused("resume_from_checkpoint", "no checkpoint to resume from"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_a_file_that_may_not_grow_costs_the_checkpoint_and_not_the_run(tiny_run, tmp_path):
    """A real limit of the system: no file may have more than so many bytes (as a quota does)."""
    resource = pytest.importorskip("resource")
    config = tiny_run(checkpointing_steps=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The adapter has some 20 kB, the state with its two moments more than twice of that.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.warns(
            UserWarning, match=r"no checkpoint at step 2.*only the adapter was saved"
        ):
            result = train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_adapter(result.adapter).layers
    assert checkpoints_in(tmp_path / "out") == []
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".run.lock"]


def test_a_full_disk_keeps_the_earlier_checkpoint_and_says_where_to_resume(
    tiny_run, tmp_path, monkeypatch, capsys
):
    from dora_diffusion.cli.commands.train import stopped_line

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


def test_the_best_stays_beside_the_limit_until_another_is_better(saver, tmp_path):
    one = saver(limit=1)
    one.put(50, is_best=True)
    one.put(100)
    one.put(200)
    assert names(tmp_path) == ["checkpoint-200", "checkpoint-50"]
    one.put(300, is_best=True)
    assert names(tmp_path) == ["checkpoint-300"]
    assert one.take_removed() == ("checkpoint-100", "checkpoint-50", "checkpoint-200")
    every = saver()
    every.resume_from(tmp_path / "checkpoint-300", interim=False, best=300)
    every.put(350, is_best=True)
    every.put(360, is_best=True)
    # One that was saved for that alone goes, and a regular one stays.
    assert names(tmp_path) == ["checkpoint-300", "checkpoint-360"]
