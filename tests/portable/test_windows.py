"""The emulation of Windows: each refusal is seen here, and that others keep what we lose."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.portable import windows
from tests.waiting import STAY

pytestmark = pytest.mark.skipif(
    not windows.is_installed(), reason="Windows is not emulated: make test-portable"
)


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
