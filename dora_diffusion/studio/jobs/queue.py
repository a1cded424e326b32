"""The queue: creates jobs, starts them one at a time, and stops, resumes and deletes them.

Each worker is a separate process. The system frees a lock when the process that holds it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from dora_diffusion import system
from dora_diffusion.cli.console.errors import explain_to_all
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.studio.jobs import records, store
from dora_diffusion.studio.jobs.store import DamagedFile, UserError, Workspace

KILL_AFTER_SECONDS = 30.0
_MOST_JOBS_WAITING = 50
_LEAVING_SECONDS = 30.0
_WORKER_MODULE = "dora_diffusion.studio.worker"
PERSON: ContextVar[str] = ContextVar("person", default="")
"""Name of the requesting user, who owns the new jobs; empty if the app has no logins."""


def create_job(
    folder: Path, record: records.JobRecord, files: Mapping[str, str | Path] | None = None
) -> str:
    """Append a job to the queue.

    Args:
        folder: Folder of the job, see `Workspace.new_job`.
        record: The command to run.
        files: Further contents of the folder by name: a text, or a file or folder to copy, so that
            later edits do not change the job.

    Returns:
        Id of the job.

    Raises:
        UserError: If too many jobs wait.
    """
    if sum(map(is_waiting, Workspace(folder.parent).job_folders)) >= _MOST_JOBS_WAITING:
        raise UserError("the queue is full; wait for a run to end, or remove one")
    # A temporary name until it is complete: the queue must never see half a job.
    draft = folder.with_name(f".new-{folder.name}")
    draft.mkdir(parents=True)
    for name, content in (files or {}).items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (draft / name).write_text(content, encoding="utf-8")
        elif content.is_dir():
            shutil.copytree(content, draft / name)
        else:
            shutil.copyfile(content, draft / name)
    now, owner = time.time(), PERSON.get()
    records.write_record(draft, dataclasses.replace(record, owner=owner, created=now, queued=now))
    system.replace(draft, folder)
    return folder.name


def is_waiting(folder: Path) -> bool:
    """Return whether a job waits in the queue: it has neither a worker nor a result."""
    # `os.path` does not raise if a folder is not readable.
    has_begun = any(os.path.exists(folder / name) for name in (records.RESULT, records.WORKER))
    return os.path.isfile(folder / records.JOB) and not has_begun


def waiting_jobs(workspace: Workspace) -> list[Path]:
    """Return the folders of waiting jobs in starting order, without damaged ones."""
    waiting = _records_of(job for job in workspace.job_folders if is_waiting(job))
    return [job for _, job in sorted((record.queued, job) for job, record in waiting.items())]


def _records_of(folders: Iterable[Path]) -> dict[Path, records.JobRecord]:
    """Return the records of jobs by folder, without damaged ones."""
    readable = {}
    for folder in folders:
        with contextlib.suppress(DamagedFile):
            readable[folder] = records.read_record(folder)
    return readable


def is_running(folder: Path) -> bool:
    """Return whether a job's process is alive."""
    return not os.path.exists(folder / records.RESULT) and worker_of(folder) is not None


def stop_job(folder: Path) -> None:
    """Request that a running job save and exit, or remove a waiting job from the queue."""
    if is_waiting(folder):
        records.write_result(folder, records.JobResult(records.STOPPED_CODE, finished=time.time()))
        (folder / records.STOP).touch()  # For a worker that has started meanwhile.
    elif is_running(folder) and not (folder / records.STOP).exists():
        (folder / records.STOP).touch()


def ask_job(folder: Path, name: str) -> None:
    """Send a training run one of `formats.files.runs.REQUESTS`, served after its current step.

    Raises:
        UserError: If the run is not training.
    """
    if not is_running(folder):
        raise UserError("this run is not training now; resume it first")
    (folder / name).touch()


def stop_asked(folder: Path) -> float | None:
    """Return the time of the request to stop a job, or None."""
    try:
        return (folder / records.STOP).stat().st_mtime
    except OSError:
        return None


def may_kill(folder: Path) -> bool:
    """Return whether a job still runs so long after a request to stop that it may be killed."""
    requested = stop_asked(folder) or time.time()
    return time.time() - requested >= KILL_AFTER_SECONDS and is_running(folder)


def kill_job(folder: Path) -> None:
    """Kill a job's process and its children. The job is then shown as crashed.

    Raises:
        UserError: If the job was not stopped first, or has had too little time to exit.
    """
    worker = worker_of(folder)
    if worker is None:
        return
    if not may_kill(folder):
        raise UserError(
            f"stop the run first; it can be killed when it has not left {KILL_AFTER_SECONDS:.0f} "
            "seconds later"
        )
    end_tree(worker)


def requeue_job(folder: Path) -> None:
    """Return an ended job to the queue. A run resumes from its latest checkpoint.

    Raises:
        UserError: If the job waits or runs, or its record is damaged.
    """
    record = records.read_record(folder)
    if is_waiting(folder) or is_running(folder):
        raise UserError("this run is already waiting or running")
    words = record.arguments
    if record.kind == "train":
        words = records.train_arguments(folder, resume=True)
    records.write_record(folder, dataclasses.replace(record, arguments=words, queued=time.time()))
    for name in (records.STOP, records.PROGRESS, records.WORKER, records.RESULT):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def delete_job(workspace: Workspace, job_id: str) -> bool:
    """Delete a job with its files and exports, and the jobs that process it.

    Returns:
        Whether everything was deleted, see `remove_folder`.

    Raises:
        UserError: If the job does not exist, or it or a job that processes it is running.
    """
    folder = workspace.job(job_id)
    if is_running(folder):
        raise UserError("this run is still running; stop it first")
    jobs = _records_of(workspace.job_folders)
    dependents = {job: record for job, record in jobs.items() if record.run == job_id}
    for job, record in dependents.items():
        if is_running(job):
            raise UserError(f'"{record.title}" is still running and needs this run; stop it first')
    deleted = [_remove_job(job) for job in (*dependents, folder)]
    if job_id in store.ids_in(workspace.exports):
        deleted.append(store.remove_folder(workspace.exports / job_id))
    (workspace.thumbnails / f"{job_id}.jpg").unlink(missing_ok=True)
    return all(deleted)


def _remove_job(folder: Path) -> bool:
    """Delete a job's folder, whose log an exiting worker may still have open."""
    try:
        return store.remove_folder(folder)
    except UserError:  # Windows keeps a folder with an open file.
        worker = worker_of(folder)
        if worker is not None:
            with contextlib.suppress(psutil.Error):
                worker.wait(_LEAVING_SECONDS)
        return store.remove_folder(folder)


class JobQueue:
    """Starts waiting jobs, one at a time, oldest request first.

    Several apps may share a runs folder. Only the app that holds the queue's lock starts jobs.

    Args:
        workspace: The runs folder.
        before_start: Called before a job starts, to free the app's own memory.
    """

    def __init__(self, workspace: Workspace, before_start: Callable[[], None] | None = None):
        self.workspace = workspace
        self._before_start = before_start or (lambda: None)
        self._lock = Lock(workspace.queue_lock)
        self._is_leader = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._stop = threading.Event()
        self._ticking = threading.Lock()
        self.problem = ""
        """Failure of the last tick, in one line for the page; empty if it succeeded."""
        self._problems: list[str] = []

    def start(self, period: float = 1.0) -> JobQueue:
        """Call `tick` in a separate thread until `close`."""

        def run() -> None:
            while not self._stop.wait(period):
                self.tick()

        threading.Thread(target=run, name="job-queue", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop ticking; running jobs continue."""
        self._stop.set()
        self._lock.free()

    def tick(self) -> str | None:
        """Mark crashed jobs, and start the next job if none runs. Returns the id of the new job.

        Failures are logged and kept in ``problem`` until the next tick; they are not raised.
        """
        # The page calls this too, so that a run starts at once.
        with self._ticking:
            started, self._problems = None, []
            with self._noting("the queue could not continue"):
                started = self._tick()
            self.problem = "; ".join(self._problems)
            return started

    def _tick(self) -> str | None:
        self._children = [child for child in self._children if child.poll() is None]
        if not self._is_leader:
            self._is_leader = self._lock.take()
            if not self._is_leader:
                return None
            with self._noting("the remains of deleted runs could not be removed"):
                for path in self.workspace.remove_leftovers():
                    print(f"warning: {path} could not be removed", file=sys.stderr)
        with self._noting("a run that crashed could not be marked"):
            reap(self.workspace)
        waiting = waiting_jobs(self.workspace)
        if not waiting or any(map(is_running, self.workspace.job_folders)):
            return None
        # The worker may have enough memory anyway.
        with self._noting("the app's memory could not be freed for a run"):
            self._before_start()
        for folder in waiting:
            with self._noting(f"run {folder.name} could not be started"):
                self._children.append(start_worker(folder))
                return folder.name
        return None

    @contextlib.contextmanager
    def _noting(self, task: str) -> Iterator[None]:
        """Record a failure of the block for the page; log it the first time."""
        try:
            yield
        except Exception as error:
            problem = f"{task}: {explain_to_all(error)}"
            if problem not in self.problem:
                traceback.print_exception(error, file=sys.stderr)
                print(f"warning: {problem}", file=sys.stderr)
            self._problems.append(problem)


def reap(workspace: Workspace) -> list[str]:
    """Mark jobs whose process ended without a result as crashed. Returns their ids."""
    crashed = []
    for folder in workspace.job_folders:
        begun, ended = folder / records.WORKER, folder / records.RESULT
        if os.path.exists(ended) or not os.path.exists(begun):
            continue
        # Check the result again: the job may have ended normally since the first check.
        if worker_of(folder) is None and not os.path.exists(ended):
            records.write_result(folder, records.JobResult(None, finished=time.time()))
            crashed.append(folder.name)
    return crashed


def start_time(pid: int) -> float | None:
    """Return a process's start time in seconds since 1970; None if it has ended or is a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def find_process(
    pid: object, start: object, is_ours: Callable[[list[str]], bool]
) -> psutil.Process | None:
    """Return the live process with a recorded pid and start time, or None.

    The system reuses pids, so the start time is compared too. A change of the system's clock also
    changes the start time; the command line then identifies the process.

    Args:
        pid: Recorded pid.
        start: Recorded start time; see `start_time`.
        is_ours: Returns whether the words of a command line are the expected process's.
    """
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        is_the_one = process.create_time() == start or is_ours(process.cmdline())
        return process if is_the_one else None
    except psutil.Error:  # it has ended, or is another user's
        return None


def end_tree(process: psutil.Process) -> None:
    """Kill a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it cannot start more
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


class Lock:
    """File lock. The system frees it when the process that holds it ends, even in a crash.

    Raises:
        OSError: From `take`, if the file system does not support locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # One thread may free a lock that another thread took.
        self._lock = FileLock(path, mode=0o600, thread_local=False)

    def take(self, *, wait: bool = False) -> bool:
        """Acquire the lock. Without ``wait``, returns False if this or another object holds it."""
        if self._lock.is_locked:
            return False
        try:
            self._lock.acquire(timeout=-1 if wait else 0, poll_interval=0.05)
        except Timeout:
            return False
        except NotImplementedError as error:
            raise OSError(
                f"the disk of {self.path} has no locks; choose another folder (--runs_dir)"
            ) from error
        return True

    def free(self) -> None:
        """Release the lock."""
        self._lock.release()


@contextlib.contextmanager
def holding(path: Path, or_wait: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold a lock inside the block; retry while ``or_wait`` is true. Yields whether it is held."""
    lock = Lock(path)
    while not (is_held := lock.take()) and or_wait():
        time.sleep(0.1)
    try:
        yield is_held
    finally:
        lock.free()


def note_worker(folder: Path, pid: int) -> bool:
    """Record the process that works on a job. Returns False if it has already ended."""
    start = start_time(pid)
    if start is not None:
        store.write_json(folder / records.WORKER, {"pid": pid, "start": start})
    return start is not None


def worker_of(folder: Path) -> psutil.Process | None:
    """Return a job's live process, or None."""

    def is_ours(words: list[str]) -> bool:
        # Compare the job's id only: the runs folder may have been renamed.
        return _WORKER_MODULE in words and Path(words[-1]).name == folder.name

    worker = store.read_json(folder / records.WORKER)
    return find_process(worker.get("pid"), worker.get("start"), is_ours)


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Start a job's process, which outlives this one, and record its pid."""
    (folder / records.STOP).unlink(missing_ok=True)
    # Progress bars go to a log file, where ten lines a second are useless.
    environment = os.environ | {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONIOENCODING"] = "utf-8"  # Windows has another default for files.
    if is_embedded(records.read_record(folder).base):
        environment.setdefault("OMP_NUM_THREADS", "1")
    with (folder / records.LOG).open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", _WORKER_MODULE, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            **system.detached(),
        )
    # The worker records itself too, in case this process dies here. It may already have ended.
    if not note_worker(folder, child.pid) and not (folder / records.RESULT).exists():
        records.write_result(folder, records.JobResult(1, finished=time.time()))
    return child
