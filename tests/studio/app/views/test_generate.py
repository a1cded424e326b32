"""The Generate tab's handlers."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio
from PIL import Image

from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import generate
from dora_diffusion.studio.app.views.generate import refresh
from dora_diffusion.studio.jobs.image_generator import MOST_RECENT
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import UserError
from tests.studio.app.views.helpers import handler
from tests.studio.jobs.helpers import seen, started_run


def test_a_template_that_is_opened_and_left_keeps_the_prompt(context: Context) -> None:
    use = handler(context, "<lambda>", "generate")
    assert use("a photo of two {subject}s") == "a photo of two {subject}s"
    for left in (None, ""):
        assert use(left) == gradio.skip()


def test_the_newest_result_is_chosen_until_somebody_chooses(context: Context) -> None:
    def chosen(shown: str | None, *jobs: Job) -> Any:
        return refresh(context, jobs, shown)["adapter"][0]

    base = f"base/{context.models[0]}"
    first = chosen(None)
    assert "value" not in first
    assert first["choices"][0][1] == base
    job = dataclasses.replace(
        seen(started_run(context.workspace, 4)), state="done", checkpoints=("checkpoint-4",)
    )
    assert job.stands
    assert chosen(None, job)["value"] == job.id
    # Whoever wants the base model keeps it.
    assert "value" not in chosen(base, job)


def test_images_are_made_of_the_newest_result_where_nothing_is_chosen(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def make_request(context: Context, choice: str | None, form: dict[str, Any]) -> None:
        asked.append(choice)
        raise UserError("enough")

    monkeypatch.setattr(generate, "make_request", make_request)
    with gradio.Blocks():
        fields = [None] * len(generate.GenerateTab(context).form)
    for name, more in (("make", []), ("compare", []), ("grid", ["1"])):
        with pytest.raises(gradio.Error):
            handler(context, name, "generate")(None, *more, *fields)
    assert asked == [f"base/{context.models[0]}"] * 3


def test_the_page_says_what_images_wait_for(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(*jobs: Job) -> str:
        return str(refresh(context, jobs, None)["turn"])

    job = seen(started_run(context.workspace, 4, "<mug>"))
    assert turn(job) == ""
    running = dataclasses.replace(job, state="running")
    assert "Images wait until &lt;mug&gt; has ended (about 12 s)" in turn(running)
    monkeypatch.setattr(context.generator, "is_waiting", True)
    for said in (turn(running), turn(job)):
        assert "Waiting until" in said
        assert "data-do='withdraw'" in said
    handler(context, "withdraw", "generate")()
    assert not context.generator._waits_on()


def test_images_of_earlier_visits_are_there_newest_first_and_show_their_settings(
    context: Context,
) -> None:
    def history() -> str:
        return str(refresh(context, (), None)["history"])

    folder = context.workspace.images
    assert "No images yet" in history()
    for number in range(MOST_RECENT + 1):
        text = f"a <mug> {number}\nSteps: 2, Seed: {number}, Size: 8x8"
        path = save_image(Image.new("RGB", (8, 8)), folder / f"{number}.png", text)
        os.utime(path, (1e9 + number, 1e9 + number))
    (folder / ".part.png").symlink_to("/etc/passwd")
    (folder / "damaged.png").write_bytes(b"no image")
    shown = history()
    names = [f"{number}.png" for number in range(MOST_RECENT, 1, -1)]
    assert [shown.index(f"data-value='{name}'") for name in ["damaged.png", *names]] == sorted(
        shown.index(f"data-value='{name}'") for name in ["damaged.png", *names]
    )
    assert shown.count("<img") == MOST_RECENT
    assert "a &lt;mug&gt; 24" in shown
    show = handler(context, "show", "generate")

    def clicked(name: str) -> list[Any]:
        event: Any = SimpleNamespace(what="show", value=name)
        return show(event)

    _, pictures, settings = clicked("7.png")
    assert pictures["value"] == [(str(folder / "7.png"), "seed 7")]
    assert "Steps: 2, Seed: 7" in settings
    for name in ("../.device.lock", ".part.png", "none.png"):
        with pytest.raises(gradio.Error, match="no longer exists"):
            clicked(name)
