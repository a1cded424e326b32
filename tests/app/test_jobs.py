"""Jobs: queue, stop, kill, resume, crashes, locks; with real processes that only sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.processes import Lock, end_group, holding, is_alive, process_start
from dora_diffusion.jobs.snapshot import Job, read_job, snapshot
from dora_diffusion.jobs.workspace import AppError, Workspace, read_json, write_json


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, as a worker is."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    yield child
    child.kill()
    child.wait()


def make(workspace: Workspace, title: str = "sks mug") -> Path:
    return workspace.root / jobs.create_job(workspace, "train", title, {})


def pretend_running(folder: Path, child: subprocess.Popen[bytes]) -> None:
    write_json(folder / jobs.WORKER, {"pid": child.pid, "start": process_start(child.pid)})


def seen(folder: Path) -> Job:
    job = read_job(folder)
    assert job is not None
    return job


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
    assert (folder / jobs.STOP).exists()
    assert seen(folder).state == "stopping"


def test_a_dead_process_is_a_crash_with_its_cause(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    (folder / jobs.LOG).write_text(
        "error: of before\n--- 2026 again ---\nerror: the disk is full\n"
    )
    sleeper.kill()
    sleeper.wait()
    assert (seen(folder).state, seen(folder).cause) == ("crashed", "the disk is full")
    assert jobs.reap(workspace) == [folder.name]
    assert read_json(folder / jobs.RESULT)["code"] is None
    assert seen(folder).state == "crashed"


def test_a_crash_without_a_word_says_what_to_do(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / jobs.WORKER, {"pid": 2**22 + 1, "start": "1"})
    assert "Resume" in seen(folder).cause


def test_another_process_with_the_same_pid_is_not_the_worker(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / jobs.WORKER, {"pid": os.getpid(), "start": "12"})
    assert seen(folder).state == "crashed"
    assert not end_group(os.getpid(), "12", signal.SIGKILL)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    start = process_start(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, start)
    child.wait()


@pytest.mark.parametrize(
    ("code", "state"), [(143, "stopped"), (130, "stopped"), (1, "failed"), (3, "failed")]
)
def test_the_exit_code_tells_how_a_job_ended(workspace: Workspace, code: int, state: str) -> None:
    folder = make(workspace)
    (folder / jobs.LOG).write_text("error: the loss is nan at step 3\n")
    write_json(folder / jobs.RESULT, {"code": code})
    assert seen(folder).state == state
    assert seen(folder).cause == ("the loss is nan at step 3" if state == "failed" else "")


def test_exit_code_0_without_an_adapter_that_opens_is_not_done(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / jobs.RESULT, {"code": 0})
    assert (seen(folder).state, seen(folder).cause) == (
        "failed",
        "the run ended without an adapter file",
    )
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 40)
    assert seen(folder).state == "failed"
    assert "cannot be opened" in seen(folder).cause


def test_a_waiting_job_can_be_taken_out_and_put_back(workspace: Workspace) -> None:
    folder = make(workspace)
    jobs.stop_job(folder)
    assert seen(folder).state == "stopped"
    jobs.requeue_job(folder)
    assert seen(folder).state == "waiting"
    assert read_json(folder / jobs.JOB)["resume"] is True


def test_a_resumed_job_goes_to_the_end_of_the_queue(workspace: Workspace) -> None:
    first, second = make(workspace), make(workspace)
    jobs.stop_job(first)
    jobs.requeue_job(first)
    assert [seen(f).state for f in (first, second)] == ["waiting", "waiting"]
    assert {j.id: j.position for j in snapshot(workspace.root)} == {second.name: 1, first.name: 2}


def test_a_running_job_is_neither_resumed_nor_deleted(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    with pytest.raises(AppError, match="already waiting or running"):
        jobs.requeue_job(folder)
    with pytest.raises(AppError, match="still running"):
        jobs.delete_job(workspace, folder.name)


def test_kill_is_refused_until_stop_had_its_time(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    with pytest.raises(AppError, match="stop the run first"):
        jobs.kill_job(folder)
    jobs.stop_job(folder)
    assert not seen(folder).may_kill
    long_ago = time.time() - jobs.KILL_AFTER_SECONDS - 1
    os.utime(folder / jobs.STOP, (long_ago, long_ago))
    assert seen(folder).may_kill
    jobs.kill_job(folder)
    assert sleeper.wait(10) == -signal.SIGKILL
    assert seen(folder).state == "crashed"


def test_delete_removes_the_job_and_its_exports(workspace: Workspace) -> None:
    folder = make(workspace)
    export = workspace.exports / folder.name
    export.mkdir()
    jobs.delete_job(workspace, folder.name)
    assert not folder.exists()
    assert not export.exists()
    assert snapshot(workspace.root) == ()


def test_what_was_made_of_a_deleted_run_goes_with_it(workspace: Workspace) -> None:
    run, other = make(workspace), make(workspace)
    for of in (run, other):
        jobs.create_job(workspace, "merge", "Merge", {"run": of.name})
    jobs.delete_job(workspace, run.name)
    kept = {job.id: job.facts.get("run") for job in snapshot(workspace.root)}
    assert list(kept.values()).count(other.name) == 1
    assert run.name not in kept.values()
    assert len(kept) == 2


@pytest.mark.parametrize("kind", ["merge", "compare", "push"])
def test_a_run_is_not_deleted_under_a_job_about_it(
    workspace: Workspace, sleeper: subprocess.Popen[bytes], kind: str
) -> None:
    run = make(workspace)
    waiting = workspace.root / jobs.create_job(workspace, "merge", "Merge it", {"run": run.name})
    busy = workspace.root / jobs.create_job(workspace, kind, "Use sks mug", {"run": run.name})
    pretend_running(busy, sleeper)
    with pytest.raises(AppError, match='"Use sks mug" is still running and needs this run'):
        jobs.delete_job(workspace, run.name)
    assert run.is_dir()
    assert waiting.is_dir()
    assert busy.is_dir()
    write_json(busy / jobs.RESULT, {"code": 143})
    jobs.delete_job(workspace, run.name)
    assert snapshot(workspace.root) == ()


def test_photos_are_copied_before_the_queue_can_see_the_job(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "001.jpg").write_bytes(b"x")
    job_id = jobs.create_job(workspace, "train", "a", {}, photos=tmp_path / "photos")
    assert (workspace.root / job_id / "photos" / "001.jpg").read_bytes() == b"x"


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path;"
        "from dora_diffusion.jobs.processes import Lock;"
        "lock = Lock(Path(sys.argv[1])); print(lock.take(), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"True\n"
    with holding(path) as held:
        assert not held
    child.kill()
    child.wait()
    with holding(path) as held:
        assert held


def test_only_one_app_starts_jobs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        started.append(folder.name)
        write_json(folder / jobs.RESULT, {"code": 0})
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


def test_a_second_job_waits_for_the_first(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    first, second = make(workspace), make(workspace)
    pretend_running(first, sleeper)
    queue = jobs.JobQueue(workspace)
    assert queue.tick() is None
    assert seen(second).state == "waiting"
    queue.close()


def test_the_queue_has_an_end(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MOST_JOBS_WAITING", 2)
    make(workspace), make(workspace)
    with pytest.raises(AppError, match="the queue is full"):
        make(workspace)


def test_lock_of_a_holder_in_this_process(tmp_path: Path) -> None:
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take()
    assert not two.take()
    one.free()
    assert two.take()
