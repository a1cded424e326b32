"""The state of a job as its folder and its process tell it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs import records
from dora_diffusion.jobs.queue import worker_of
from dora_diffusion.jobs.snapshot import read_job, snapshot
from dora_diffusion.jobs.workspace import Workspace, read_json, remove_folder, write_json
from tests.jobs.helpers import make, pretend_running, seen, started_run


def test_a_dead_process_is_a_crash_with_its_cause(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    (folder / records.LOG).write_text(
        "error: of before\n--- 2026 again ---\nerror: the disk is full\n", encoding="utf-8"
    )
    sleeper.kill()
    sleeper.wait()
    assert (seen(folder).state, seen(folder).cause) == ("crashed", "the disk is full")
    assert jobs.reap(workspace) == [folder.name]
    assert read_json(folder / records.RESULT)["code"] is None
    assert seen(folder).state == "crashed"


def test_a_crash_without_a_word_says_what_to_do(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / records.WORKER, {"pid": 2**22 + 1, "start": "1"})
    assert "Resume" in seen(folder).cause


def test_another_process_with_the_same_pid_is_not_the_worker(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / records.WORKER, {"pid": os.getpid(), "start": 12.0})
    assert seen(folder).state == "crashed"
    assert worker_of(folder) is None


@pytest.mark.parametrize("start", ["8423771", "Thu Nov 26 10:53:56 2026", 1795686836.0, None])
def test_a_worker_is_known_whatever_its_start_was_noted_as(
    workspace: Workspace, start: object
) -> None:
    """By an earlier version, in clock ticks or by ps; or before the clock was set."""
    folder, other = make(workspace), make(workspace)
    code = "import time; print(flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, "dora_diffusion.jobs.worker", f"elsewhere/{folder.name}"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        for job in (folder, other):
            write_json(job / records.WORKER, {"pid": child.pid, "start": start})
        assert seen(folder).state == "running"
        assert seen(other).state == "crashed", "the pid is another job's worker's now"
    finally:
        child.kill()
        child.communicate()
    assert seen(folder).state == "crashed"


@pytest.mark.parametrize(
    ("code", "state"), [(143, "stopped"), (130, "stopped"), (1, "failed"), (3, "failed")]
)
def test_the_exit_code_tells_how_a_job_ended(workspace: Workspace, code: int, state: str) -> None:
    folder = make(workspace)
    (folder / records.LOG).write_text("error: the loss is nan at step 3\n", encoding="utf-8")
    write_json(folder / records.RESULT, {"code": code})
    assert seen(folder).state == state
    assert seen(folder).cause == ("the loss is nan at step 3" if state == "failed" else "")


def test_exit_code_0_without_an_adapter_that_opens_is_not_done(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / records.RESULT, {"code": 0})
    assert (seen(folder).state, seen(folder).cause) == (
        "failed",
        "the run ended without an adapter file",
    )
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 40)
    assert seen(folder).state == "failed"
    assert "cannot be opened" in seen(folder).cause


def test_progress_and_time_left_come_from_measured_steps(workspace: Workspace) -> None:
    job = read_job(started_run(workspace, 4))
    assert job is not None
    assert (job.step, job.total, job.step_seconds, job.remaining_seconds) == (4, 10, 2.0, 12.0)
    assert job.trigger == "sks mug"


def test_broken_files_do_not_break_the_page(workspace: Workspace) -> None:
    folder = started_run(workspace, 1)
    for name in (records.WORKER, records.RESULT, records.PROGRESS):
        (folder / name).write_text("{", encoding="utf-8")
    assert len(snapshot(workspace.root)) == 1
    (folder / records.JOB).write_text("", encoding="utf-8")
    assert snapshot(workspace.root) == ()


def test_a_job_that_is_deleted_while_it_is_read_is_not_a_crash(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(workspace)
    write_json(folder / records.WORKER, {"pid": 2**22 + 1, "start": "1"})
    write_json(folder / records.RESULT, {"code": 0})
    read = records.read_result

    def read_too_late(path: Path) -> records.JobResult | None:
        remove_folder(path)
        return read(path)

    monkeypatch.setattr(records, "read_result", read_too_late)
    assert read_job(folder) is None
