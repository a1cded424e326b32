"""An app that starts no worker, and a subject."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.jobs.subjects import add_photos, new_subject
from tests.data.prepare.conftest import models  # noqa: F401 (a fixture)


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """An app with the default folder, relative to where it was started, that starts no worker."""
    monkeypatch.chdir(tmp_path)
    one = Context(Launch())
    monkeypatch.setattr(one.queue, "tick", lambda: None)
    return one


@pytest.fixture
def subject(context: Context, tmp_path: Path) -> str:
    subject_id = new_subject(context.workspace, "Mug")
    Image.effect_noise((80, 64), 60).convert("RGB").save(tmp_path / "a.png")
    add_photos(context.workspace, subject_id, [tmp_path / "a.png"])
    return subject_id
