"""Real jobs of a tiny random model: train, stop, resume, kill; and what is made of a run."""

from __future__ import annotations

import html
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dora_diffusion.cli import main as cli
from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.studio import worker
from dora_diffusion.studio.app.html import task_card
from dora_diffusion.studio.app.settings import command_line
from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs import records, tasks
from dora_diffusion.studio.jobs.queue import Lock
from dora_diffusion.studio.jobs.records import log_tail, read_metrics
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import Workspace
from tests.studio.jobs.helpers import (
    about,
    add_run,
    attempt,
    job_of,
    make,
    perform,
    wait,
)


def test_a_run_ends_with_an_adapter_and_its_measurements(finished: tuple[Workspace, str]) -> None:
    job = job_of(finished)
    assert (job.state, job.step, job.total) == ("done", 3, 3)
    assert job.checkpoints == ("checkpoint-2", "checkpoint-3")
    assert job.trigger == "sks dog"
    assert job.result.peak_memory > 0.05
    assert job.progress.device_name


def test_the_commands_that_are_shown_make_the_same_adapter(
    finished: tuple[Workspace, str], tmp_path: Path
) -> None:
    """To the last bit, the one of the form before it starts, and the one of the run."""
    job = job_of(finished)
    planned = command_line(TrainConfig.from_dict(job.settings)).replace("\\\n", " ")
    for place, shown in enumerate((planned, job.record.command)):
        words = shlex.split(shown)
        again = tmp_path / str(place)
        assert words[:3] == ["python", "-m", "dora_diffusion"]
        assert cli.main([*words[3:], "--output_dir", str(again)]) == 0  # the later one counts
        name = "pytorch_lora_weights.safetensors"
        ours, theirs = load_file(job.folder / name), load_file(again / name)
        assert set(ours) == set(theirs)
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_run_whose_worker_was_killed_goes_on_and_one_that_is_stopped_saves(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path, photos: Path
) -> None:
    """A killed worker is a crash, behind its last checkpoint; a stop saves where it was."""
    job_id = add_run(workspace, sd1_folder, photos, max_train_steps=100_000, checkpointing_steps=2)
    folder = workspace.root / job_id
    wait(workspace, queue, job_id, lambda job: len(job.checkpoints) > 0)
    process = jobs.worker_of(folder)
    assert process is not None
    process.kill()
    crashed = wait(workspace, queue, job_id, lambda job: job.state == "crashed")
    at = step_of(crashed.checkpoints[-1])
    lock = Lock(workspace.device_lock)
    assert lock.take(wait=True)  # the kernel frees it when the last thread has ended
    lock.free()
    jobs.requeue_job(folder)
    again = wait(workspace, queue, job_id, lambda job: _goes_on(job, at))
    steps = [record["step"] for record in read_metrics(again.folder)]
    assert steps == list(range(1, len(steps) + 1))
    jobs.stop_job(folder)
    stopped = wait(workspace, queue, job_id, lambda job: job.state == "stopped")
    assert step_of(stopped.checkpoints[-1]) == stopped.step > at


def step_of(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("checkpoint-"))


def _goes_on(job: Job, at: int) -> bool:
    """True once a run has begun again at a step; before, its files tell of the earlier attempt."""
    return job.progress.first_step == at and job.step > at


@pytest.mark.parametrize(
    ("moment", "code"), [("_run", records.STOPPED_CODE), ("_peaks", 1)], ids=["before", "after"]
)
def test_a_stop_at_either_end_of_a_job_is_no_crash(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, moment: str, code: int
) -> None:
    folder, real = make(workspace), getattr(worker, moment)

    def stopped(*of: Path) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*of)

    monkeypatch.setattr(worker, "_watch_for_stop", lambda file: None)
    monkeypatch.setattr(worker, moment, stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert worker.main([str(folder)]) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    result = records.read_result(folder)
    assert result is not None
    assert result.code == code


def test_a_conversion_says_what_the_command_line_says(
    finished: tuple[Workspace, str], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, run = finished[0], job_of(finished)
    job = perform(workspace, tasks.start_conversion(workspace, run, "sd-scripts"))
    output = Path(job.record.output)
    assert set(read_adapter(output).layers) == set(read_adapter(chosen_adapter(run)).layers)
    words = list(job.record.arguments)
    again = output.with_name("again.safetensors")
    words[2] = str(again)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    theirs, ours = load_file(again), load_file(output)
    assert set(theirs) == set(ours)
    assert all(theirs[key].equal(ours[key]) for key in ours)
    shown = html.unescape(task_card(job))
    assert "relative error of the change: median" in printed
    for line in printed.replace(str(again), output.name).splitlines():
        assert line in shown
    assert f"{output}: " not in shown  # the name alone


def test_a_mistake_in_the_arguments_is_a_failure_with_its_line(workspace: Workspace) -> None:
    run = make(workspace)
    folder = about(run, "export", "--bass", "b")
    jobs.stop_job(run)
    job = attempt(workspace, folder.name)
    assert job.state == "failed"
    assert job.result is not None
    assert (job.result.code, job.cause) == (2, "there is no flag --bass (did you mean --base?)")
    assert "usage: " in log_tail(folder)


def test_a_job_that_has_nothing_to_save_stops_at_once(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path
) -> None:
    """While it waits for the device, here."""
    run = make(workspace)
    folder = about(run, "export", "--base", str(sd1_folder), "--output", "x")
    jobs.stop_job(run)
    device = Lock(workspace.device_lock)
    device.take(wait=True)
    phase = "waiting for the device"
    wait(workspace, queue, folder.name, lambda job: job.progress.phase == phase)
    jobs.stop_job(folder)
    wait(workspace, queue, folder.name, lambda job: job.state == "stopped")
    device.free()
    assert records.read_result(folder).code == records.STOPPED_CODE
