"""Workers as processes: which one is whose, and locks that die with their holder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from dora_diffusion import system
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.workspace import read_json, write_json

_WORKER_MODULE = "dora_diffusion.studio.worker"
_POLL_SECONDS = 0.05


def start_time(pid: int) -> float | None:
    """Return the start time of a process, in seconds since 1970; None if it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def find_process(
    pid: object, start: object, is_ours: Callable[[list[str]], bool]
) -> psutil.Process | None:
    """The living process of a pid, if it is the one that was noted.

    A pid alone is not enough: the system gives it to another process later. It is ours if it was
    started at the noted time. Where the clock was set since, the system tells another time: then
    its command line says whether it is ours.

    Args:
        pid: What was noted as its pid.
        start: What was noted as its start; see `start_time`.
        is_ours: Knows it by the words of its command line.
    """
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        is_the_one = process.create_time() == start or is_ours(process.cmdline())
        return process if is_the_one else None
    except psutil.Error:  # it is gone, or another user's
        return None


def end_tree(process: psutil.Process) -> None:
    """End a process and all that it has started, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it starts no more of them meanwhile
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


class Lock:
    """A lock on a file, which the system frees when its holder ends, however that happens.

    Raises:
        OSError: When it is taken, if the disk has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # One thread may take what another one frees.
        self._lock = FileLock(path, mode=0o600, thread_local=False)

    def take(self, *, wait: bool = False) -> bool:
        """Acquire the lock; without ``wait``, False if another holds it, or this object."""
        if self._lock.is_locked:
            return False
        try:
            self._lock.acquire(timeout=-1 if wait else 0, poll_interval=_POLL_SECONDS)
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
    """Try to hold a lock inside the block, while ``or_wait`` says so; yields whether it is held."""
    lock = Lock(path)
    while not (taken := lock.take()) and or_wait():
        time.sleep(0.1)
    try:
        yield taken
    finally:
        lock.free()


def note_worker(folder: Path, pid: int) -> bool:
    """Write down which process works on a job; False if it is gone already."""
    start = start_time(pid)
    if start is not None:
        write_json(folder / records.WORKER, {"pid": pid, "start": start})
    return start is not None


def worker_of(folder: Path) -> psutil.Process | None:
    """A job's living process; None if there is none."""

    def is_ours(words: list[str]) -> bool:
        # By the job's id: the runs folder may have been renamed meanwhile.
        return _WORKER_MODULE in words and Path(words[-1]).name == folder.name

    worker = read_json(folder / records.WORKER)
    return find_process(worker.get("pid"), worker.get("start"), is_ours)


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Start a job's process, which outlives this one, and note who it is."""
    (folder / records.STOP).unlink(missing_ok=True)
    # Bars are read from a file here: ten lines a second help nobody.
    environment = os.environ | {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONIOENCODING"] = "utf-8"  # Windows has another one for what is not a terminal.
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
    # The worker writes the same, in case this process dies right here.
    if not note_worker(folder, child.pid):
        records.write_result(folder, records.JobResult(1, finished=time.time()))
    return child
