"""Differences of operating systems: files that are in use, detached processes, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dora_diffusion import system
from tests.waiting import Clock


def in_use(number: int = 32) -> PermissionError:
    error = PermissionError(13, "used by another process")
    error.winerror = number  # type: ignore[attr-defined]
    return error


@pytest.fixture
def pauses(clock: Callable[..., Clock]) -> list[float]:
    """Seconds that would be waited."""
    return clock(system).slept


@pytest.mark.parametrize("number", [5, 32])
def test_a_short_look_at_a_file_is_waited_for(number: int, pauses: list[float]) -> None:
    answers = [in_use(number), in_use(number), None]

    def action() -> str:
        if (error := answers.pop(0)) is not None:
            raise error
        return "done"

    assert system.patiently(action) == "done"
    assert pauses == [0.01, 0.02]


def test_a_file_that_stays_open_is_an_error_in_the_end(pauses: list[float]) -> None:
    def action() -> None:
        raise in_use()

    with pytest.raises(PermissionError) as refused:
        system.patiently(action)
    assert system.is_in_use(refused.value)
    assert 1 < sum(pauses) < 2


def test_replace_takes_the_place_of_a_file(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    system.replace(new, old)
    assert old.read_bytes() == b"new"
    assert not new.exists()


@pytest.mark.skipif(system.HANGUP is None, reason="sessions are POSIX's")
def test_a_detached_process_has_a_session_of_its_own() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, **system.detached())
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        child.communicate()


def test_the_most_memory_that_was_in_use() -> None:
    """A process that holds 300 MB. A small one starts it: Linux hands its parent's peak down."""
    code = (
        "from dora_diffusion.system import peak_memory; import psutil;"
        "held = bytearray(b'x') * 300_000_000; within = psutil.Process().memory_info().rss;"
        "print(peak_memory(), within / 2**30)"
    )
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, check=True)
    peak, within = map(float, done.stdout.split())
    assert within > 0.28
    assert peak == pytest.approx(within, rel=0.05)
    before = psutil.Process().memory_info().rss / 2**30
    assert system.peak_memory() >= before * 0.99


@pytest.mark.skipif(system.HANGUP is None, reason="Windows has a temporary folder for each user")
def test_a_private_folder_is_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.tempfile, "tempdir", str(tmp_path))
    umask = os.umask(0)
    try:
        folder = system.private_folder("x")
    finally:
        os.umask(umask)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert system.private_folder("x") == folder
    for mode in (0o701, 0o710, 0o770, 0o777):
        folder.chmod(mode)
        with pytest.raises(PermissionError, match="open to others"):
            system.private_folder("x")
    folder.chmod(0o700)
    name = os.getuid() + 1
    folder.rename(tmp_path / f"dora-diffusion-{name}-x")
    monkeypatch.setattr(system.os, "getuid", lambda: name)
    with pytest.raises(PermissionError, match="another user's"):
        system.private_folder("x")
    for there in (tmp_path, tmp_path / "nothing"):
        link = tmp_path / f"dora-diffusion-{name}-link"
        link.symlink_to(there)
        with pytest.raises(OSError, match=r"is a link|File exists"):
            system.private_folder("link")
        link.unlink()
