"""Real runs of a tiny random model: train, stop, resume, kill."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from dora_diffusion.app.settings import command_line
from dora_diffusion.config import TrainConfig
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.logs import read_metrics
from dora_diffusion.jobs.processes import Lock
from dora_diffusion.jobs.workspace import Workspace
from tests.jobs.helpers import (
    add_run,
    job_of,
    wait,
)


def test_a_run_ends_with_an_adapter_and_its_measurements(finished: tuple[Workspace, str]) -> None:
    job = job_of(finished)
    assert (job.state, job.step, job.total) == ("done", 3, 3)
    assert job.checkpoints == ("checkpoint-2", "checkpoint-3")
    assert job.trigger == "sks dog"
    assert job.result.peak_memory > 0.05
    assert job.progress.device_name


def test_the_command_that_is_shown_makes_the_same_adapter(
    finished: tuple[Workspace, str], tmp_path: Path
) -> None:
    """To the last bit: the page's run and its command line are one thing."""
    job = job_of(finished)
    shown = command_line(TrainConfig.from_dict(job.settings))
    words = shlex.split(shown.replace("\\\n", " "))
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    assert words[:2] == ["python", "-m"]
    subprocess.run(
        [sys.executable, *words[1:]], check=True, capture_output=True, env={**os.environ}
    )
    name = "pytorch_lora_weights.safetensors"
    ours, again = load_file(job.folder / name), load_file(tmp_path / "again" / name)
    assert set(ours) == set(again)
    assert all(ours[key].equal(again[key]) for key in ours)


def test_stop_saves_and_resume_goes_on_counting(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path, photos: Path
) -> None:
    job_id = add_run(
        workspace, sd1_folder, photos, max_train_steps=100_000, checkpointing_steps=100_000
    )
    wait(workspace, queue, job_id, lambda job: job.step >= 2)
    jobs.stop_job(workspace.root / job_id)
    stopped = wait(workspace, queue, job_id, lambda job: job.state == "stopped")
    (checkpoint,) = stopped.checkpoints
    at = int(checkpoint.removeprefix("checkpoint-"))
    assert at >= 2
    jobs.requeue_job(workspace.root / job_id)
    again = wait(workspace, queue, job_id, lambda job: job.step > at)
    assert again.progress.first_step == at
    steps = [record["step"] for record in read_metrics(again.folder)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_worker_is_a_crash_and_its_run_can_go_on(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path, photos: Path
) -> None:
    job_id = add_run(workspace, sd1_folder, photos, max_train_steps=100_000, checkpointing_steps=2)
    folder = workspace.root / job_id
    wait(workspace, queue, job_id, lambda job: bool(job.checkpoints))
    worker = jobs.worker_of(folder)
    assert worker is not None
    worker.kill()
    crashed = wait(workspace, queue, job_id, lambda job: job.state == "crashed")
    at = int(crashed.checkpoints[-1].removeprefix("checkpoint-"))
    lock = Lock(workspace.device_lock)
    assert lock.take(wait=True)  # the kernel frees it when the last thread has ended
    lock.free()
    jobs.requeue_job(folder)
    assert wait(workspace, queue, job_id, lambda job: job.step > at).progress.first_step == at


def test_a_run_that_cannot_work_says_why(
    workspace: Workspace, queue: jobs.JobQueue, photos: Path, tmp_path: Path
) -> None:
    job_id = add_run(workspace, tmp_path / "no-model", photos)
    job = wait(workspace, queue, job_id, lambda job: job.state == "failed")
    assert "no-model does not exist" in job.cause
    assert "\n" not in job.cause
