"""The queue: start, stop, kill, resume and delete, with processes that only sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dora_diffusion import system
from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.records import JobRecord
from dora_diffusion.studio.jobs.snapshot import snapshot
from dora_diffusion.studio.jobs.store import UserError, Workspace, read_json, write_json
from tests.studio.jobs.helpers import (
    about,
    make,
    pretend_running,
    seen,
)
from tests.waiting import WAIT_SECONDS, Clock


def test_a_new_job_waits_and_the_oldest_is_first(workspace: Workspace) -> None:
    first, second = make(workspace, "one"), make(workspace, "two")
    states = {job.id: (job.state, job.position) for job in snapshot(workspace.root)}
    assert states == {first.name: ("waiting", 1), second.name: ("waiting", 2)}


def test_a_living_process_is_running_until_it_is_asked_to_stop(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    assert seen(folder).state == "running"
    jobs.stop_job(folder)
    assert (folder / records.STOP).exists()
    assert seen(folder).state == "stopping"


def test_a_waiting_job_can_be_taken_out_and_put_back(workspace: Workspace) -> None:
    folder = make(workspace)
    jobs.stop_job(folder)
    assert seen(folder).state == "stopped"
    (folder / records.STOP).touch()  # As where its worker was asked to stop.
    jobs.requeue_job(folder)
    assert seen(folder).state == "waiting"
    assert not (folder / records.STOP).exists()
    # Without a checkpoint it begins again; with one it resumes.
    assert read_json(folder / records.JOB)["arguments"][-1] == "--overwrite_output_dir"
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "training_state.pt").touch()
    for _ in range(2):
        jobs.stop_job(folder)
        jobs.requeue_job(folder)
        words = read_json(folder / records.JOB)["arguments"]
        assert words[3:] == ["--resume_from_checkpoint", "latest"]


def test_a_running_job_is_neither_resumed_nor_deleted(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    with pytest.raises(UserError, match="already waiting or running"):
        jobs.requeue_job(folder)
    with pytest.raises(UserError, match="still running"):
        jobs.delete_job(workspace, folder.name)


def test_kill_is_refused_until_stop_had_its_time(
    workspace: Workspace, sleeper: subprocess.Popen[bytes], clock: Callable[..., Clock]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    with pytest.raises(UserError, match="stop the run first"):
        jobs.kill_job(folder)
    jobs.stop_job(folder)
    time = clock(jobs)
    time.now = (folder / records.STOP).stat().st_mtime + jobs.KILL_AFTER_SECONDS - 1
    assert not seen(folder).may_kill
    time.now += 1
    assert seen(folder).may_kill
    jobs.kill_job(folder)
    assert sleeper.wait(WAIT_SECONDS) != 0
    assert seen(folder).state == "crashed"


def test_delete_removes_the_job_and_its_exports(workspace: Workspace) -> None:
    folder = make(workspace)
    export = workspace.exports / folder.name
    export.mkdir()
    jobs.delete_job(workspace, folder.name)
    assert not folder.exists()
    assert not export.exists()
    assert snapshot(workspace.root) == ()


@pytest.mark.parametrize("kind", ["export", "rank-checkpoints", "convert"])
def test_a_run_is_not_deleted_under_a_job_about_it(
    workspace: Workspace, sleeper: subprocess.Popen[bytes], kind: str
) -> None:
    run = make(workspace)
    waiting, busy = about(run), about(run, kind, title="Use sks mug")
    pretend_running(busy, sleeper)
    with pytest.raises(UserError, match='"Use sks mug" is still running and needs this run'):
        jobs.delete_job(workspace, run.name)
    assert run.is_dir()
    assert waiting.is_dir()
    assert busy.is_dir()
    write_json(busy / records.RESULT, {"code": 143})
    jobs.delete_job(workspace, run.name)
    assert snapshot(workspace.root) == ()


def test_a_job_is_deleted_once_its_worker_has_left(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows its log is open, and its folder stays, for as long as the worker lives."""
    folder = make(workspace)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pretend_running(folder, child)
    write_json(folder / records.RESULT, {"code": 0})
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if jobs.worker_of(folder) is not None:
            error = PermissionError(13, "used by another process")
            error.winerror = 32  # type: ignore[attr-defined]
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(system, "_PAUSES", ())
    waited = psutil.Process.wait
    monkeypatch.setattr(
        psutil.Process, "wait", lambda self, limit: (child.communicate(b"\n"), waited(self, limit))
    )
    jobs.delete_job(workspace, folder.name)
    assert not folder.exists()


def test_photos_are_copied_before_the_queue_can_see_the_job(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "001.jpg").write_bytes(b"x")
    files = {"photos": tmp_path / "photos", "a/b.jpg": tmp_path / "photos" / "001.jpg", "c": "d"}
    folder = workspace.root / jobs.create_job(workspace.new_job(), JobRecord(["train"]), files)
    assert (folder / "photos" / "001.jpg").read_bytes() == b"x"
    assert (folder / "a" / "b.jpg").read_bytes() == b"x"
    assert (folder / "c").read_text(encoding="utf-8") == "d"


def test_only_one_app_starts_jobs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        started.append(folder.name)
        write_json(folder / records.RESULT, {"code": 0})
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(jobs, "start_worker", start)
    folder = make(workspace)
    one, two = jobs.JobQueue(workspace), jobs.JobQueue(workspace)
    assert one.tick() == folder.name
    assert two.tick() is None
    other = make(workspace)
    assert two.tick() is None
    one.close()
    assert two.tick() == other.name
    two.close()
    assert started == [folder.name, other.name]


def test_a_worker_that_ends_before_it_is_noted_keeps_its_result(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(workspace)

    def done(words: list[str], **options: object) -> subprocess.Popen[bytes]:
        monkeypatch.undo()
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        records.write_result(folder, records.JobResult(2))
        return child

    monkeypatch.setattr(subprocess, "Popen", done)
    jobs.start_worker(folder)
    assert records.read_result(folder) == records.JobResult(2)


def test_a_second_job_waits_for_the_first_and_starts_when_that_has_crashed(
    workspace: Workspace, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        jobs, "start_worker", lambda folder: subprocess.Popen([sys.executable, "-c", ""])
    )
    first, second = make(workspace), make(workspace)
    pretend_running(first, sleeper)
    queue = jobs.JobQueue(workspace)
    assert queue.tick() is None
    assert seen(second).state == "waiting"
    sleeper.kill()
    sleeper.wait()
    assert queue.tick() == second.name
    assert seen(first).state == "crashed"
    queue.close()


def starting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note workers instead of starting them; returns the titles of those that were."""
    started: list[str] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        title = records.read_record(folder).title
        if title.startswith("bad"):
            raise IsADirectoryError(21, "Is a directory", "log.txt")
        started.append(title)
        write_json(folder / records.RESULT, {"code": 143})
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(jobs, "start_worker", start)
    return started


def test_a_run_starts_though_the_app_s_memory_cannot_be_freed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch says it after an error on the device: a RuntimeError of its own."""
    started = starting(monkeypatch)
    failing = [True]

    def release() -> None:
        if failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    make(workspace, "first"), make(workspace, "second")
    queue = jobs.JobQueue(workspace, before_start=release)
    assert queue.tick() is not None
    assert queue.tick() is not None
    assert sorted(started) == ["first", "second"]
    assert queue.problem.startswith("the app's memory could not be freed for a run: unexpected Ru")
    assert "illegal memory" not in queue.problem  # whoever sees the page need not run the app
    told = capsys.readouterr().err
    assert told.count("RuntimeError: CUDA error: an illegal memory access") == 1
    assert told.count("warning: the app's memory could not be freed") == 1
    failing.clear()
    queue.tick()
    assert queue.problem == ""
    queue.close()


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), OSError(28, "No space left"), KeyError(1)]
)
def test_the_queue_s_thread_survives_whatever_a_tick_raises(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    started, real, failures = starting(monkeypatch), jobs.waiting_jobs, [error, error]
    ended = threading.Event()

    def waiting(of: Workspace) -> list[Path]:
        if failures:
            raise failures.pop()
        found = real(of)
        if not found:
            ended.set()
        return found

    monkeypatch.setattr(jobs, "waiting_jobs", waiting)
    make(workspace, "good")
    queue = jobs.JobQueue(workspace).start(0.001)
    assert ended.wait(WAIT_SECONDS)
    assert started == ["good"]
    queue.close()
