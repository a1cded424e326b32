"""Jobs on disk: making, queueing, stopping, resuming and deleting them.

A job is a folder, and its state follows from the files in it and from whether its process lives:

    job.json      what was asked for; written by the app
    settings.yaml the training settings (``dora-diffusion train --config`` takes the same file)
    worker.json   pid and start time of the process that works on it
    progress.json what the work is doing
    STOP          asks the worker to save and leave
    result.json   exit code and times; written when the worker ends in an orderly way
    chosen.json   the checkpoint that stands for a training run, where one was chosen
    log.txt       all that the worker printed
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.jobs.processes import Lock, end_group, is_alive, process_start
from dora_diffusion.jobs.workspace import (
    AppError,
    Workspace,
    ids_in,
    new_id,
    read_json,
    remove_folder,
    write_json,
)
from dora_diffusion.models.locate import EMBEDDED_PREFIX

JOB, SETTINGS, WORKER, PROGRESS = "job.json", "settings.yaml", "worker.json", "progress.json"
STOP, RESULT, LOG, CHOSEN = "STOP", "result.json", "log.txt", "chosen.json"
KILL_AFTER_SECONDS = 30.0
_MOST_JOBS_WAITING = 50


def create_job(
    workspace: Workspace,
    kind: str,
    title: str,
    facts: Mapping[str, Any],
    settings: Callable[[Path], str] | None = None,
    photos: Path | None = None,
) -> str:
    """Put a job at the end of the queue.

    Args:
        workspace: The runs folder.
        kind: ``"train"``, ``"merge"``, ``"compare"`` or ``"push"``.
        title: What the page calls it.
        facts: More for job.json.
        settings: Gives the text of settings.yaml for the job's folder.
        photos: Folder to copy to the job's ``photos``, so that later edits do not change a run.

    Returns:
        Its id.

    Raises:
        AppError: If too many jobs wait.
    """
    if (
        sum(is_waiting(workspace.root / job) for job in ids_in(workspace.root))
        >= _MOST_JOBS_WAITING
    ):
        raise AppError("the queue is full; wait for a run to end, or remove one")
    job_id = new_id()
    # Under another name until it is whole: the queue must never see half a job.
    draft = workspace.root / f".new-{job_id}"
    draft.mkdir(parents=True)
    if settings is not None:
        text = settings(workspace.root / job_id)
        (draft / SETTINGS).write_text(text, encoding="utf-8")
    if photos is not None:
        shutil.copytree(photos, draft / "photos")
    now = time.time()
    write_json(
        draft / JOB,
        {"kind": kind, "title": title, "created": now, "queued": now, "resume": False, **facts},
    )
    os.replace(draft, workspace.root / job_id)
    return job_id


def worker_of(folder: Path) -> tuple[int, str] | None:
    """Pid and start time of a job's living process; None if there is none."""
    worker = read_json(folder / WORKER)
    pid, start = worker.get("pid"), worker.get("start")
    return (pid, start) if is_alive(pid, start) else None  # type: ignore[return-value]


def is_waiting(folder: Path) -> bool:
    """Whether a job waits in the queue: it has neither a worker nor a result."""
    files = (RESULT, WORKER)
    return (folder / JOB).is_file() and not any((folder / name).exists() for name in files)


def is_running(folder: Path) -> bool:
    """Whether a job's process lives."""
    return not (folder / RESULT).exists() and worker_of(folder) is not None


def stop_job(folder: Path) -> None:
    """Ask a running job to save and leave; take a waiting one out of the queue."""
    if is_waiting(folder):
        write_json(folder / RESULT, {"code": 128 + signal.SIGTERM, "finished": time.time()})
    elif is_running(folder) and not (folder / STOP).exists():
        (folder / STOP).write_text(f"{time.time()}\n", encoding="utf-8")


def stop_asked(folder: Path) -> float | None:
    """When the job was asked to stop, or None."""
    try:
        return (folder / STOP).stat().st_mtime
    except OSError:
        return None


def may_kill(folder: Path, now: float) -> bool:
    """Whether a job was asked to stop so long ago that killing it is offered."""
    asked = stop_asked(folder)
    return asked is not None and now - asked >= KILL_AFTER_SECONDS and is_running(folder)


def kill_job(folder: Path) -> None:
    """End a job's process and its children at once. It shows as crashed.

    Raises:
        AppError: If it was not asked to stop first, and given time to.
    """
    worker = worker_of(folder)
    if worker is None:
        return
    if not may_kill(folder, time.time()):
        raise AppError(
            f"stop the run first; it can be killed when it has not left {KILL_AFTER_SECONDS:.0f} "
            "seconds later"
        )
    end_group(*worker, signal.SIGKILL)


def requeue_job(folder: Path) -> None:
    """Put a job that ended back into the queue: it goes on from its latest checkpoint.

    Raises:
        AppError: If it waits or runs.
    """
    if is_waiting(folder) or is_running(folder):
        raise AppError("this run is already waiting or running")
    job = read_json(folder / JOB)
    write_json(folder / JOB, job | {"resume": True, "queued": time.time()})
    for name in (STOP, PROGRESS, WORKER, RESULT):
        (folder / name).unlink(missing_ok=True)


def delete_job(workspace: Workspace, job_id: str) -> None:
    """Delete a job with its files, its exports, and the jobs that made them.

    Raises:
        AppError: If it or a job about it is running, or it is unknown.
    """
    folder = workspace.job(job_id)
    if is_running(folder):
        raise AppError("this run is still running; stop it first")
    jobs = [workspace.root / name for name in ids_in(workspace.root)]
    about_it = [job for job in jobs if read_json(job / JOB).get("run") == job_id]
    for job in about_it:
        if is_running(job):
            title = read_json(job / JOB).get("title")
            raise AppError(f'"{title}" is still running and needs this run; stop it first')
    for job in (*about_it, folder):
        remove_folder(job)
    if job_id in ids_in(workspace.exports):
        remove_folder(workspace.exports / job_id)


class JobQueue:
    """Starts waiting jobs, one at a time, oldest request first.

    Several apps may share a runs folder: the one that holds the queue's lock starts the jobs.

    Args:
        workspace: The runs folder.
        before_start: Called before a job starts; frees what the app itself holds.
    """

    def __init__(self, workspace: Workspace, before_start: Callable[[], None] | None = None):
        self.workspace = workspace
        self._before_start = before_start or (lambda: None)
        self._lock = Lock(workspace.queue_lock)
        self._is_leader = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._ticking = threading.Lock()

    def start(self, period: float = 1.0) -> JobQueue:
        """Tick in a thread of its own until `close`."""

        def run() -> None:
            while not self._stop.wait(period):
                try:
                    self.tick()
                except OSError as error:  # a full disk must not end the queue
                    print(f"warning: the queue could not go on: {error}", file=sys.stderr)

        threading.Thread(target=run, name="job-queue", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop ticking; running jobs go on."""
        self._stop.set()
        self._lock.free()

    def tick(self) -> str | None:
        """Reap what ended, and start the next job if none runs. Returns the id it started."""
        # The page ticks too, so that a run starts at once.
        with self._ticking:
            return self._tick()

    def _tick(self) -> str | None:
        self._children = [child for child in self._children if child.poll() is None]
        if not self._is_leader:
            self._is_leader = self._lock.take()
            if not self._is_leader:
                return None
        reap(self.workspace)
        folders = [self.workspace.root / job for job in ids_in(self.workspace.root)]
        if any(is_running(folder) for folder in folders):
            return None
        waiting = [folder for folder in folders if is_waiting(folder)]
        if not waiting:
            return None
        folder = min(waiting, key=lambda path: read_json(path / JOB).get("queued", 0.0))
        self._before_start()
        self._children.append(start_worker(folder))
        return folder.name


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Start a job's process in a session of its own, and note who it is."""
    (folder / STOP).unlink(missing_ok=True)
    # Bars are read from a file here: ten lines a second help nobody.
    environment = os.environ | {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}
    if is_small(str(read_json(folder / JOB).get("base"))):
        environment.setdefault("OMP_NUM_THREADS", "1")
    with (folder / LOG).open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "dora_diffusion.jobs.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    start = process_start(child.pid)
    if start is None:
        write_json(folder / RESULT, {"code": 1, "finished": time.time()})
    else:
        # The worker writes the same, in case this process dies right here.
        write_json(folder / WORKER, {"pid": child.pid, "start": start})
    return child


def is_small(model: str) -> bool:
    """Whether a model is so small that threads mostly wait for each other: one does it all."""
    return model.startswith(EMBEDDED_PREFIX)


def reap(workspace: Workspace) -> list[str]:
    """Write down that jobs whose process died without a word have crashed. Returns their ids."""
    crashed = []
    for job_id in ids_in(workspace.root):
        folder = workspace.root / job_id
        if (folder / RESULT).exists() or not (folder / WORKER).exists():
            continue
        # The second look: it may have ended in good order after the first.
        if worker_of(folder) is None and not (folder / RESULT).exists():
            write_json(folder / RESULT, {"code": None, "finished": time.time()})
            crashed.append(job_id)
    return crashed
