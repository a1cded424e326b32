"""Publishing a run is a job."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion import hub
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.exports import card_of
from dora_diffusion.jobs.push import run_push, start_push
from dora_diffusion.jobs.records import ProgressFile, PushRequest
from dora_diffusion.jobs.workspace import Workspace
from tests.jobs.helpers import ended_run, job_of, seen


def test_a_run_without_an_adapter_is_not_published(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "check", lambda name: None)
    with pytest.raises(RequestError, match="no adapter yet"):
        start_push(workspace, ended_run(workspace, (), 3), "ann/mug", True)


def test_what_stands_for_a_run_is_published(
    finished: tuple[Workspace, str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    pushed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def push(*args: Any, **options: Any) -> str:
        pushed.append((args, options))
        return "https://hub/ann/mug"

    monkeypatch.setattr(hub, "check", checked.append)
    monkeypatch.setattr(hub, "push", push)
    run = job_of(finished)
    folder = workspace.root / start_push(workspace, run, " ann/mug\n", True)
    job = seen(folder)
    assert (job.title, job.state) == (f"Publish {run.title}", "waiting")
    assert job.request == PushRequest(run=run.id, repository="ann/mug", private=True)
    assert checked == ["ann/mug"]
    run_push(finished[0], job.request, ProgressFile(folder))
    adapter = run.folder / "pytorch_lora_weights.safetensors"
    options = {"private": True, "adapter": adapter, "card": card_of(run)}
    assert pushed == [((run.folder, "ann/mug"), options)]
    progress = seen(folder).progress
    assert (progress.phase, progress.address) == ("uploaded", "https://hub/ann/mug")
    assert (progress.done, progress.total) == (1, 1)
