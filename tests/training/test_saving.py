"""Checkpoints: when they are due, what stays of them, how a run is extended, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_diffusion.config import ConfigError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training import saving
from dora_diffusion.training.checkpoint import checkpoints_in
from dora_diffusion.training.loop import train
from dora_diffusion.training.saving import CheckpointSaver
from dora_diffusion.training.session import Session

Usage = namedtuple("Usage", "total used free")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def steps_in(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def same(first: Path, second: Path) -> bool:
    first, second = read_adapter(first).layers, read_adapter(second).layers
    return set(first) == set(second) and all(
        torch.equal(getattr(layer, part), getattr(second[name], part))
        for name, layer in first.items()
        for part in ("down", "up", "magnitude")
    )


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

    real = Session.train_step

    def two_minutes(self, step):
        clock.now += 120
        if step == 8 and self.config.output_dir.endswith("c"):
            raise RuntimeError("power cut")
        return real(self, step)

    monkeypatch.setattr(Session, "train_step", two_minutes)
    whole = tiny_run(max_train_steps=9, checkpointing_steps=1000, output_dir=str(tmp_path / "w"))
    train(whole)
    crashed = replace(whole, output_dir=str(tmp_path / "c"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(crashed)
    assert names(tmp_path / "c") == ["checkpoint-6"], "after 6 minutes, and again after 12"
    monkeypatch.setattr(Session, "train_step", real)
    train(replace(crashed, resume_from_checkpoint="latest"))
    assert same(tmp_path / "w", tmp_path / "c")
    assert names(tmp_path / "c") == ["checkpoint-9"]


def test_a_finished_run_is_extended_from_its_last_step(tiny_run, tmp_path):
    whole = tiny_run(max_train_steps=5, checkpointing_steps=2, output_dir=str(tmp_path / "whole"))
    train(whole)
    short = tiny_run(max_train_steps=3, checkpointing_steps=2)
    assert train(short).checkpoint == tmp_path / "out" / "checkpoint-3"
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]
    events = []
    train(replace(short, max_train_steps=5, resume_from_checkpoint="latest"), events.append)
    (start,) = (event for event in events if event["event"] == "start")
    assert (start["step"], start["resumed_from"], start["steps_dropped"]) == (3, "checkpoint-3", 0)
    assert same(tmp_path / "whole", tmp_path / "out")
    assert steps_in(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_steps_that_are_trained_again_are_said(tiny_run, tmp_path, capsys):
    from dora_diffusion.commands.train import TrainProgress

    config = tiny_run(checkpointing_steps=2)
    train(config)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    show = TrainProgress()
    train(replace(config, max_train_steps=5, resume_from_checkpoint="latest"), show)
    show.close()
    line = "resuming from checkpoint-2, at step 2 of 5; steps 3 to 4 are trained again"
    assert line in capsys.readouterr().out.splitlines()


def test_fewer_steps_than_the_checkpoint_has_is_an_error(tiny_run, tmp_path):
    config = tiny_run(checkpointing_steps=2)
    train(config)
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"checkpoint-4 has 4 steps, more than the 3 that are"):
        train(replace(config, max_train_steps=3, resume_from_checkpoint="latest"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


def test_as_many_steps_write_the_result_again(tiny_run, tmp_path):
    """What a run needs that ended between its last step and its result."""
    config = tiny_run(checkpointing_steps=2)
    adapter = train(config).adapter
    before = adapter.read_bytes()
    adapter.unlink()
    assert train(replace(config, resume_from_checkpoint="latest")).adapter.read_bytes() == before


def test_without_checkpoints_the_advice_does_not_name_one(tiny_run):
    config = tiny_run(checkpointing_steps=0)
    train(config)
    with pytest.raises(ConfigError) as error:
        train(config)
    assert "no checkpoint to resume from (a run with --checkpointing_steps 0 keeps none)" in str(
        error.value
    )
    assert "--overwrite_output_dir" in str(error.value)
    assert "resume_from_checkpoint" not in str(error.value)
    with pytest.raises(ConfigError, match="train anew with --overwrite_output_dir"):
        train(replace(config, resume_from_checkpoint="latest"))


# Full disks


def no_room(monkeypatch, free: int, real=shutil.disk_usage) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


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
        if event["event"] == "step" and event["step"] == 3:
            no_room(monkeypatch, 0)
            signal.raise_signal(signal.SIGTERM)

    config = tiny_run(checkpointing_steps=2, max_train_steps=50)
    with pytest.warns(UserWarning, match=r"the newest is checkpoint-2"):
        result = train(config, stop)
    assert result.checkpoint == tmp_path / "out" / "checkpoint-2"
    line = stopped_line(result)
    assert line.startswith(f"stopped at step {result.steps} of 50; ")
    assert line.endswith("--resume_from_checkpoint latest resumes from checkpoint-2")


def test_metrics_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    from dora_diffusion.training.metrics import MetricsLog

    log = MetricsLog(tmp_path / "metrics.jsonl", 0, lambda record: None)
    real, refused = log._file._file.write, []

    class Full:
        """A disk that takes half of a line and then nothing."""

        def write(self, data):
            if not refused:
                refused.append(data)
                return real(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(disk, name)

    disk, log._file._file = log._file._file, Full()
    log.add({"step": 1, "loss": 0.5})
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written: No space left"):
        log.add({"step": 2, "loss": 0.5})
    log.add({"step": 3, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == "", "no half line"
    log._file._file = disk
    log.flush()
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_samples_that_a_full_disk_refuses_are_a_warning(tiny_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dora_diffusion.training.loop.save_png", full)
    config = tiny_run(max_train_steps=2, validation_steps=1, num_validation_images=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(config)
    told = [str(one.message) for one in caught if "No space left" in str(one.message)]
    assert told[0].startswith("no samples at step 1: ")
    assert told[1].startswith("the adapter is written, but not all of its samples and card: ")
    assert read_adapter(result.adapter).layers
    assert os.listdir(tmp_path / "out")
