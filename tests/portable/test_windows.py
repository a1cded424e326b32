"""The emulation of Windows: each refusal is seen here, and that others keep what we lose."""

from __future__ import annotations

import ctypes.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock

from tests.portable import windows
from tests.waiting import STAY

pytestmark = pytest.mark.skipif(
    not windows.is_installed(), reason="Windows is not emulated: make test-portable"
)


@pytest.mark.parametrize("module", windows.GONE_MODULES)
def test_modules_of_posix_are_gone(module: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__(module)
    with pytest.raises(pytest.skip.Exception):
        pytest.importorskip(module)


@pytest.mark.parametrize(
    ("module", "name"),
    [(os, n) for n in windows.GONE["os"]] + [(signal, n) for n in windows.GONE["signal"]],
)
def test_names_of_posix_are_gone(module: object, name: str) -> None:
    assert not hasattr(module, name)
    with pytest.raises(AttributeError, match=name):
        getattr(module, name)


def test_names_that_are_imported_are_gone_too() -> None:
    with pytest.raises(ImportError):
        from os import fork  # noqa: F401
    with pytest.raises(ImportError):
        from signal import SIGKILL  # noqa: F401


def test_proc_is_gone_for_us_and_not_for_psutil() -> None:
    assert not Path("/proc/self/stat").exists()
    for look in (
        lambda: open("/proc/self/stat", encoding="utf-8"),  # noqa: SIM115
        lambda: Path("/proc/meminfo").read_text(encoding="utf-8"),
        lambda: os.listdir("/proc"),
        lambda: list(Path("/proc").iterdir()),
    ):
        with pytest.raises(FileNotFoundError):
            look()
    assert psutil.Process().memory_info().rss > 0


def test_libraries_keep_what_they_use(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", "print(1)"], check=True, capture_output=True)
    assert ctypes.util.find_library("c")
    with FileLock(tmp_path / "lock"):
        assert shutil.disk_usage(tmp_path).free > 0


def test_processes_are_started_by_spawn_and_in_no_session_of_their_own() -> None:
    assert multiprocessing.get_start_method() == "spawn"
    with pytest.raises(ValueError, match="start_new_session is not supported"):
        subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    with pytest.raises(ValueError, match="preexec_fn"):
        subprocess.run([sys.executable, "-c", ""], preexec_fn=print, check=True)


SLEEP = f"import signal; signal.signal(signal.SIGTERM, print); {STAY}"


@pytest.mark.parametrize("way", ["kill", "send_signal"])
def test_a_signal_ends_another_process_at_once(way: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    if way == "kill":
        os.kill(child.pid, signal.SIGTERM)
    else:
        child.send_signal(signal.SIGTERM)
    child.communicate()
    assert child.returncode == -9


def test_programs_of_ours_are_on_windows_too() -> None:
    code = "import os, signal; print(hasattr(os, 'fork'), hasattr(signal, 'SIGKILL'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"False", b"False"]
    code = (
        "from dora_diffusion import system; print(system.HANGUP, system.BREAK, system.detached())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"None", b"10", b"{'creationflags':", b"0}"]


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """A file in a folder."""
    path = tmp_path / "folder" / "file.txt"
    path.parent.mkdir()
    path.write_bytes(b"x")
    return path


ACTIONS = {
    "unlink": lambda path: path.unlink(),
    "replace": lambda path: path.replace(path.with_name("other")),
    "replaced": lambda path: os.replace(path.parent.parent / "new", path),
    "rename": lambda path: os.rename(path, path.with_name("other")),
    "move the folder": lambda path: path.parent.rename(path.parent.with_name("other")),
    "remove the folder": lambda path: shutil.rmtree(path.parent),
    "shutil.move": lambda path: shutil.move(path, path.with_name("other")),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_an_open_file_stays_where_it_is(action: str, opened: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    with opened.open("rb"), pytest.raises(PermissionError) as refused:
        ACTIONS[action](opened)
    assert refused.value.winerror == 32
    assert opened.read_bytes() == b"x"
    ACTIONS[action](opened)


HOLD = "import sys; file = open(sys.argv[1], 'rb'); print(1, flush=True); sys.stdin.read()"


def test_a_file_that_another_process_has_open_stays_too(opened: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(opened)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(PermissionError):
        opened.unlink()
    child.communicate()
    opened.unlink()


def test_a_mapped_file_is_neither_removed_nor_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(9))
    array = np.load(path, mmap_mode="r")
    with pytest.raises(PermissionError):
        path.unlink()
    with pytest.raises(PermissionError):
        path.open("wb")
    del array
    path.unlink()


def test_a_rename_replaces_nothing(opened: Path) -> None:
    other = opened.with_name("other.txt")
    other.write_bytes(b"other")
    with pytest.raises(FileExistsError):
        opened.rename(other)
    opened.replace(other)
    assert other.read_bytes() == b"x"


def test_a_folder_is_not_replaced(opened: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PermissionError):
        opened.parent.replace(tmp_path / "empty")


@pytest.mark.parametrize(
    "name",
    ["a<b", "a>b", "a:b", 'a"b', "a|b", "a?", "a*", "tab\t", "dot.", "space ", "con", "NUL",
     "aux.txt", "com1", "LPT9.tar.gz"],
)  # fmt: skip
def test_names_that_windows_has_not(name: str, opened: Path) -> None:
    for make in (
        lambda: opened.with_name(name).write_bytes(b""),
        lambda: opened.with_name(name).mkdir(),
        lambda: opened.rename(opened.with_name(name)),
        lambda: shutil.copy(opened, opened.with_name(name)),
        lambda: os.close(os.open(opened.with_name(name), os.O_WRONLY | os.O_CREAT)),
    ):
        with pytest.raises(OSError, match="name is incorrect"):
            make()
    assert os.listdir(opened.parent) == ["file.txt"]


@pytest.mark.parametrize("name", ["console", "null", "a.con", "Ünïcode with spaces", ".hidden"])
def test_names_that_only_look_alike_are_fine(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert os.listdir(tmp_path) == [name]


def test_names_do_not_differ_in_case_alone(opened: Path) -> None:
    with pytest.raises(FileExistsError):
        opened.with_name("File.TXT").write_bytes(b"")
    with pytest.raises(FileExistsError):
        opened.with_name("FILE.txt").mkdir()
    opened.write_bytes(b"again")
    opened.rename(opened.with_name("File.txt"))
    assert os.listdir(opened.parent) == ["File.txt"]
