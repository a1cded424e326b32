"""Workspaces, processes that stand for workers, and one finished run of a tiny random model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.models import locate
from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs.queue import Lock, end_tree
from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import (
    add_photos,
    new_subject,
)
from tests.shallow import *  # noqa: F403
from tests.studio.jobs.helpers import add_run, done, photo, wait
from tests.waiting import STAY


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a worker."""
    child = subprocess.Popen([sys.executable, "-c", STAY], stdout=subprocess.DEVNULL)
    yield child
    child.kill()
    child.wait()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_noise((80, 64), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture
def queue(workspace: Workspace) -> Iterator[jobs.JobQueue]:
    """A queue whose workers do not outlive the test."""
    one = jobs.JobQueue(workspace)
    yield one
    one.close()
    for folder in workspace.root.iterdir():
        worker = jobs.worker_of(folder)
        if worker is not None:
            end_tree(worker)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, photos: Path
) -> tuple[Workspace, str]:
    """A finished run, which tests only read and export."""
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "runs").make()
    queue = jobs.JobQueue(workspace)
    job_id = add_run(workspace, sd1_folder, photos)
    wait(workspace, queue, job_id, done)
    queue.close()
    lock = Lock(workspace.device_lock)
    assert lock.take(wait=True)  # the worker may still be leaving
    lock.free()
    return workspace, job_id


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(locate, "hub_cache", lambda: folder)
    return folder


@pytest.fixture
def subject(workspace: Workspace, tmp_path: Path) -> str:
    subject_id = new_subject(workspace, "Dog", "dog")
    for name in ("a.jpg", "b.jpg"):
        add_photos(workspace, subject_id, [photo(tmp_path / name, (120, 80))])
    return subject_id
