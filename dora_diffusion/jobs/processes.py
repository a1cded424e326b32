"""Whether a process still is the one that was started, and locks that die with their holder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]


def process_start(pid: int) -> str | None:
    """When a process was started, in the system's own words; None if it is gone or a zombie.

    A pid alone is not enough: the system gives it to another process later.
    """
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The command in brackets may hold spaces; the state is the field after it.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return answer[1].strip() if len(answer) == 2 and "Z" not in answer[0] else None


def is_alive(pid: object, start: object) -> bool:
    """Whether the process of this pid still is the one that started then."""
    return isinstance(pid, int) and start is not None and process_start(pid) == start


def end_group(pid: int, start: str, number: signal.Signals) -> bool:
    """Send a signal to a process and its children, if it still is the one that started then."""
    if not is_alive(pid, start):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
    return True


class Lock:
    """An flock on a file: the kernel frees it when its holder ends, however that happens."""

    def __init__(self, path: Path) -> None:
        if fcntl is None:
            raise OSError("the app needs a system with flock (Linux, macOS or WSL)")
        self.path = path
        self._file: int | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Take the lock; without ``wait``, False if another holds it."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def free(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


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
