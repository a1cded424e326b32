"""Ids from outside become paths by being looked up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion import system
from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs.store import (
    UserError,
    Workspace,
    clean_text,
    read_json,
    remove_folder,
    write_json,
)
from tests.studio.jobs.helpers import (
    started_run,
)
from tests.waiting import Clock


@pytest.mark.parametrize("job_id", ["..", "../subjects", "", None, 7, "20261125-020304-abcdef\n"])
def test_a_job_is_looked_up_by_its_id(workspace: Workspace, job_id: object) -> None:
    started_run(workspace, 1)
    with pytest.raises(UserError, match="no longer exists"):
        workspace.job(job_id)


def test_text_is_one_printable_line() -> None:
    assert clean_text(" a\tb\x07\u2028c ", 10, "prompt") == "a b c"
    with pytest.raises(UserError, match="at most 3"):
        clean_text("abcd", 3, "prompt")


def in_use(*_: object, **__: object) -> None:
    """Windows' error of a file that another program has open."""
    error = PermissionError(13, "used by another process")
    error.winerror = 32  # type: ignore[attr-defined]
    raise error


def test_a_folder_whose_files_are_in_use_is_kept_and_said_to_be(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, clock: Callable[..., Clock]
) -> None:
    folder = started_run(workspace, 1)
    before = sorted(folder.iterdir())
    monkeypatch.setattr(system.os, "replace", in_use)
    clock(system)
    with pytest.raises(UserError, match="while a program has a file of it open"):
        remove_folder(folder)
    assert sorted(folder.iterdir()) == before
    monkeypatch.undo()
    remove_folder(folder)
    assert not folder.exists()


def test_a_file_that_is_being_replaced_is_read_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job would look crashed for as long as its file is replaced on Windows."""
    write_json(tmp_path / "worker.json", {"pid": 1})
    real, refusals = Path.read_text, [1, 2]

    def read_text(path: Path, **options: str) -> str:
        if refusals:
            refusals.pop()
            in_use()
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert read_json(tmp_path / "worker.json") == {"pid": 1}
    assert refusals == []


JOB = "20261125-020304-abcdef"


def test_what_was_cut_off_is_removed_at_the_start_and_nothing_else(
    workspace: Workspace, tmp_path: Path
) -> None:
    """A kill in the middle of a deletion or of a copy leaves photos that no page shows."""
    kept, now = started_run(workspace, 1), time.time()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "001.jpg").touch()
    left = [
        workspace.root / f".new-{JOB}", workspace.root / f".deleted-{JOB}",
        workspace.subjects / f".deleted-{JOB}", workspace.exports / f".deleted-{JOB}",
        workspace.cache / "0123abcd",
    ]  # fmt: skip
    others = [
        workspace.root / ".new-notes", workspace.root / "deleted", workspace.images / f".new-{JOB}",
        workspace.subjects / JOB, workspace.cache / "of_today",
    ]  # fmt: skip
    for folder in (*left, *others):
        (folder / "photos").mkdir(parents=True)
        (folder / "photos" / "001.jpg").touch()
    long_ago = now - 25 * 3600
    os.utime(workspace.cache / "0123abcd", (long_ago, long_ago))
    link = workspace.exports / f".deleted-{JOB[:-1]}0"
    link.symlink_to(tmp_path / "elsewhere")
    jobs.stop_job(kept)  # so that no worker is started
    queue, other = jobs.JobQueue(workspace), jobs.JobQueue(workspace)
    queue.tick()
    assert not any(folder.exists() for folder in left)
    assert all((folder / "photos" / "001.jpg").is_file() for folder in others)
    assert (link / "001.jpg").is_file()
    assert (kept / "job.json").is_file()
    left[0].mkdir()  # as an app makes a job while another one starts
    other.tick()
    assert left[0].is_dir()
    queue.close()
