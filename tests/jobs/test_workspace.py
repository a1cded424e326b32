"""Ids from outside become paths by being looked up."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from dora_diffusion import system
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.workspace import Workspace, clean_text, ids_in
from tests.jobs.helpers import (
    started_run,
)


@pytest.mark.parametrize("name", ["notes", "20261125-020304-ABCDEF", ".new-20261125-020304-abcdef"])
def test_other_folders_are_no_jobs(workspace: Workspace, name: str) -> None:
    (workspace.root / name).mkdir()
    assert ids_in(workspace.root) == []


@pytest.mark.parametrize("job_id", ["..", "../subjects", "", None, 7, "20261125-020304-abcdef\n"])
def test_a_job_is_looked_up_by_its_id(workspace: Workspace, job_id: object) -> None:
    started_run(workspace, 1)
    with pytest.raises(RequestError, match="no longer exists"):
        workspace.job(job_id)


def test_text_is_one_printable_line() -> None:
    assert clean_text(" a\tb\x07\u2028c ", 10, "prompt") == "a b c"
    with pytest.raises(RequestError, match="at most 3"):
        clean_text("abcd", 3, "prompt")


def test_runs_lie_where_the_app_is_started_and_on_windows_with_the_users_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Workspace.default_root() == Path("runs")
    monkeypatch.setattr(system, "is_windows", lambda: True)
    monkeypatch.setattr(
        platformdirs, "user_data_dir", lambda name, appauthor: f"AppData/Local/{name}"
    )
    assert Workspace.default_root() == Path("AppData/Local/dora-diffusion/runs")
    (tmp_path / "runs").mkdir()
    assert Workspace.default_root() == Path("runs"), "runs that are there are not left behind"
