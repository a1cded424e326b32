"""The Train tab's handlers: what they refuse, and what a run is started with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import yaml
from PIL import Image

from dora_diffusion.app import jobs
from dora_diffusion.app.context import Context
from dora_diffusion.app.launch import Launch
from dora_diffusion.app.settings import ADVANCED, EMBEDDED, preset_values
from dora_diffusion.app.subjects import add_photos, new_subject
from dora_diffusion.app.workspace import ids_in


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


def handler(context: Context, name: str) -> Callable[..., list[Any]]:
    """A handler of the Train tab."""
    from dora_diffusion.app.page import build_page

    functions = (one.fn for one in build_page(context).fns.values())
    (found,) = (
        function for function in functions
        if getattr(function, "__module__", "").endswith("views.train")
        and function.__qualname__ == f"connect.<locals>.{name}"
    )  # fmt: skip
    return found


def fields(subject: str, prompts: str) -> list[Any]:
    """What the page sends: list settings as words."""
    values = preset_values("fast", EMBEDDED)
    shown = [" ".join(v) if isinstance(v, list) else v for v in map(values.get, ADVANCED)]
    return [subject, EMBEDDED, "sks", "mug", prompts, *shown]


def test_a_run_can_go_on_from_another_working_directory(
    context: Context, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler(context, "start")(*fields(subject, "a photo of a {subject} on the snow"))
    monkeypatch.chdir("/")
    (job_id,) = ids_in(tmp_path / "runs")
    folder = tmp_path.resolve() / "runs" / job_id
    settings = yaml.safe_load((folder / jobs.SETTINGS).read_text())
    assert settings["output_dir"] == str(folder)
    assert settings["instance_data_dir"] == str(folder / "photos")


def test_a_sample_prompt_without_the_token_is_warned_of(context: Context, subject: str) -> None:
    asked = fields(subject, "a photo of a {subject}\na photo of a mug at night")
    with pytest.warns(UserWarning, match="'a photo of a mug at night' does not contain the token"):
        handler(context, "plan")(*asked)
