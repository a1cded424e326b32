"""The run that is shown in the Train tab."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.formats.files.runs import REQUESTS
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.run import refresh
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import start_time, stop_job
from dora_diffusion.studio.jobs.store import write_json
from tests.studio.app.views.helpers import handler
from tests.studio.jobs.helpers import ended_run, make, started_run


def shown(context: Context, run: str | None = None) -> dict[str, Any]:
    """Updates that the clock would send; fields that are updated as their options."""
    parts = refresh(context, context.jobs(fresh=True), run)
    return {name: part[0] if isinstance(part, tuple) else part for name, part in parts.items()}


def test_a_run_that_never_began_does_not_displace_a_finished_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = (f"20260101-00000{second}-abcdef" for second in range(9))
    monkeypatch.setattr("dora_diffusion.studio.jobs.store.new_id", lambda: next(ids))
    finished = ended_run(context.workspace, (2,), 2)
    waiting = make(context.workspace, "next")
    assert shown(context)["run"]["value"] == waiting.name
    assert shown(context)["stop"] == {"value": "Remove from queue", "visible": True}
    _, chosen, *_ = handler(context, "run", "run", nth=0)(waiting.name)
    assert chosen["value"] == finished.id
    assert shown(context)["run"]["value"] == finished.id
    assert shown(context, waiting.name)["resume"] == {"visible": True}
    stop_job(make(context.workspace, "alone"))
    write_json(finished.folder / records.RESULT, {"code": 1})
    assert shown(context)["run"]["value"] == finished.id


def pretend_training(folder: Path) -> None:
    pid = os.getpid()
    write_json(folder / records.WORKER, {"pid": pid, "start": start_time(pid)})
    write_json(folder / records.PROGRESS, {"phase": "training"})


def test_a_training_run_is_asked_to_save_and_to_sample(context: Context) -> None:
    folder = started_run(context.workspace, 3)
    save, sample = (handler(context, "run", "run", nth=nth) for nth in (3, 4))
    for ask in (save, sample):
        with pytest.raises(gradio.Error, match="not training now"):
            ask(folder.name)
    assert shown(context)["now"] == {"visible": False}
    pretend_training(folder)
    assert shown(context)["now"] == {"visible": True}
    assert "asked" not in shown(context)["status"]
    save(folder.name)
    assert [path.name for path in folder.iterdir() if path.name in REQUESTS] == ["SAVE"]
    sample(folder.name)
    assert "asked to save · asked for sample images" in shown(context)["status"]
    (folder / "SAVE").unlink()  # as the run does
    assert "asked to save" not in shown(context)["status"]


def test_the_held_out_loss_is_beside_that_of_training(context: Context) -> None:
    folder = started_run(context.workspace, 3)
    assert "held-out" not in shown(context)["status"]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 0, "validation_loss": 0.5}\n{"step": 3, "validation_loss": 0.25}\n')
    pretend_training(folder)
    parts = shown(context)
    assert "held-out loss 0.2500 at step 3" in parts["status"]
    training, held_out = parts["loss"].removeprefix("<div class='dd-plots'>").split("</figure>")[:2]
    assert "Loss over 3 steps" in training
    assert "Validation loss, taken 2 times" in held_out


def test_samples_are_flipped_through_in_the_order_of_their_steps(context: Context) -> None:
    run = ended_run(context.workspace, (2,), 20)
    assert shown(context, run.id)["samples"] == ""
    (run.folder / "samples").mkdir()
    names = ("adapted", "base", "step-000010", "step-000009", "base_above_adapted")
    for shade, name in enumerate(names):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(run.folder / "samples" / f"{name}.png")
    markup = shown(context, run.id)["samples"]
    options = re.findall(r"<option data-image='gradio_api/file=([^?]*)\?\d*'>([^<]*)", markup)
    titles = [title for _, title in options]
    assert titles == ["the base model", "step 9", "step 10", "the result"]
    files = [Path(unquote(file)) for file, _ in options]
    assert [Image.open(file).getpixel((0, 0))[0] for file in files] == [1, 3, 2, 0]
    assert all(context.workspace.cache.resolve() in file.parents for file in files)
    files[0].unlink()  # as Gradio does after a day
    assert shown(context, run.id)["samples"] != ""
    assert files[0].is_file()


def test_a_run_s_command_line_is_there_as_a_file_and_as_flags(context: Context) -> None:
    folder = make(context.workspace, "it", max_train_steps=7, rank=3, class_word="mug")
    text = handler(context, "command", "run")(folder.name)[0]
    assert f"--config {folder / records.SETTINGS}" in text
    assert "--max_train_steps 7" in text
    assert "--rank 3" in text
    assert text.count("data-copy") == 2
