"""Identity of a process that was started, and locks that die with their holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from dora_diffusion.studio.jobs.queue import Lock, end_tree, find_process, holding, start_time
from tests.waiting import STAY, WAIT_SECONDS, wait_until


def nobody(words: list[str]) -> bool:
    return False


def test_a_process_is_found_by_its_start_or_by_its_command_line() -> None:
    start = start_time(os.getpid())
    assert start == psutil.Process().create_time()
    assert find_process(os.getpid(), start, nobody) == psutil.Process()
    assert find_process(os.getpid(), start + 1, nobody) is None
    seen: list[list[str]] = []
    assert find_process(os.getpid(), None, lambda words: not seen.append(words)) is not None
    assert seen == [psutil.Process().cmdline()]


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    start = start_time(child.pid)
    child.stdin.close()
    child_process = psutil.Process(child.pid)
    # Not waited for: it stays one.
    wait_until(lambda: child_process.status() == psutil.STATUS_ZOMBIE)
    assert start_time(child.pid) is None
    assert find_process(child.pid, start, lambda words: True) is None
    child.wait()


FAMILY = f"""
import subprocess, sys
parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
child = {STAY!r}
subprocess.run([sys.executable, "-c", parent, child])
"""


def test_a_process_ends_with_all_that_it_has_started() -> None:
    first = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()  # the grandchild is there
    process = psutil.Process(first.pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) == 3
    end_tree(process)
    first.communicate()
    gone, alive = psutil.wait_procs(family[1:], timeout=WAIT_SECONDS)
    assert (len(gone), alive) == (2, [])
    end_tree(process)  # no error: it is gone


HOLDER = (
    "import sys; from pathlib import Path;"
    "from dora_diffusion.studio.jobs.queue import Lock;"
    f"lock = Lock(Path(sys.argv[1])); print(lock.take(), flush=True); {STAY}"
)


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().split() == [b"True"]
    with holding(path) as held:
        assert not held
    child.kill()
    child.wait()
    with holding(path) as held:
        assert held


def test_lock_of_a_holder_in_this_process(tmp_path: Path) -> None:
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert one.take()
    assert not one.take()
    assert not two.take()
    one.free()
    assert two.take()
    two.free()


def test_a_disk_without_locks_is_a_plain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(OSError, match=r"has no locks; choose another folder \(--runs_dir\)"):
        Lock(tmp_path / "lock").take()
