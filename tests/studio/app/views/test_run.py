"""The run that is shown in the Train tab."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.formats.files.runs import REQUESTS
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views.run import refresh
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import start_time
from dora_diffusion.studio.jobs.store import GONE, write_json
from tests.studio.app.views.helpers import handler
from tests.studio.jobs.helpers import ended_run, make, pretend_running, seen, started_run
from tests.waiting import STAY

ADAPTER = Path(__file__).parents[3] / "formats/golden/0.1.0/diffusers-dora-ranks.safetensors"


def shown(context: Context, run: str | None = None) -> dict[str, Any]:
    """Updates that the clock would send; fields that are updated as their options."""
    parts = refresh(context, context.jobs(fresh=True), run)
    return {name: part[0] if isinstance(part, tuple) else part for name, part in parts.items()}


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
    assert "lowest at step 3: <b>0.2500</b>, the base's is 0.5000" in parts["loss"]
    training, held_out = handler(context, "draw", "run")(folder.name)
    assert training["value"]["data"][:2] == [[1, 0.1, "each step"], [2, 0.2, "each step"]]
    assert [row[0] for row in training["value"]["data"]] == [1, 2, 3] * 2
    assert held_out["value"]["data"] == [[0, 0.5, ""], [3, 0.25, ""]]
    assert training["visible"]
    assert held_out["visible"]
    hidden = {"visible": False}
    for gone in (None, GONE, "20260101-000000-abcdef"):  # The last one was deleted just now.
        drawn = handler(context, "draw", "run")(gone)
        assert [one.items() >= hidden.items() for one in drawn] == [True, True]


def test_a_run_s_command_line_is_there_as_a_file_and_as_flags(context: Context) -> None:
    folder = make(context.workspace, "it", max_train_steps=7, rank=3, class_word="mug")
    text = handler(context, "command", "run")(folder.name)[0]
    assert f"--config {folder / records.SETTINGS}" in text
    assert "--max_train_steps 7" in text
    assert "--rank 3" in text
    assert text.count("data-copy") == 2


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a worker."""
    with subprocess.Popen([sys.executable, "-c", STAY], stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def test_a_crash_a_resume_and_a_stop_are_shown_as_long_as_they_are_true(
    context: Context, worker: subprocess.Popen[bytes]
) -> None:
    folder = ended_run(context.workspace, (4,), 8).folder
    (folder / records.RESULT).unlink()
    pretend_running(folder, worker)
    click = [handler(context, "run", "run", nth=nth) for nth in range(7)]
    assert shown(context)["stop"] == {"value": "Stop and save", "visible": True}
    # What is said of a stop is in the run's card alone.
    message, *_ = click[0](folder.name)
    assert message == ""
    assert (folder / records.STOP).exists()
    assert "asked to save and stop" in shown(context)["status"]
    (folder / records.STOP).unlink()
    worker.kill()
    worker.wait()
    parts = shown(context)
    assert "crashed" in parts["status"]
    assert "Resume continues from the last checkpoint" in parts["status"]
    assert parts["resume"] == {"visible": True}
    message, *_ = click[1](folder.name)
    assert message == ""
    assert "number 1 in the queue" in shown(context)["status"]
    assert records.read_record(folder).arguments[-2:] == ["--resume_from_checkpoint", "latest"]
    click[0](folder.name)
    assert "stopped" in shown(context, folder.name)["status"]
    # Removed once that is confirmed, which the page's script tells by the id.
    assert click[6]("") == [gradio.skip()] * 9
    assert folder.exists()
    assert "The run was removed" in click[6](folder.name)[0]
    assert not folder.exists()


def finished_run(context: Context) -> Path:
    folder = ended_run(context.workspace, (4, 8), 8, code=0).folder
    for place in (folder, folder / "checkpoint-4", folder / "checkpoint-8"):
        shutil.copyfile(ADAPTER, place / "pytorch_lora_weights.safetensors")
    return folder


def test_checkpoints_are_ranked_and_one_is_chosen(context: Context) -> None:
    folder = finished_run(context)
    start, click = handler(context, "start", "run"), handler(context, "click", "run")
    assert shown(context)["chooser_start"] == {"value": "Rank the checkpoints", "visible": True}
    start(folder.name)
    (job,) = (job for job in context.jobs(fresh=True) if job.kind == "rank-checkpoints")
    assert shown(context, folder.name)["chooser_start"]["visible"] is False
    assert start(folder.name)[1]["visible"] is False  # and it is not started twice
    assert len(context.jobs(fresh=True)) == 2
    records.write_result(job.folder, records.JobResult(0))
    ranking = context.workspace.ranking(folder.name)
    ranking.mkdir(parents=True)
    rows = [
        {"name": name, "similarity": similarity, "drift": drift, "images": [f"{name}.png"]}
        for name, similarity, drift in
        (("base", 0.1, 0.0), ("checkpoint-4", 0.5, 0.1), ("result", 0.7, 0.2))
    ]  # fmt: skip
    for row in rows:
        Image.new("RGB", (8, 8)).save(ranking / f"{row['name']}.png")
    told = {"rows": rows, "missing": [], "notes": [], "suggested": "result",
            "similar_to": "the true subject"}  # fmt: skip
    write_json(ranking / "comparison.json", told)
    parts = shown(context, folder.name)
    cards = parts["chooser_cards"]
    assert parts["chooser_start"] == {"value": "Rank again", "visible": True}
    assert re.findall("<h3>([^<]*)", cards) == ["Base model", "Step 4", "Step 8"]
    similarities = re.findall(r"similarity to the true subject<.*?<b>([0-9.]+)", cards)
    assert similarities == ["0.10", "0.50", "0.70"]
    assert re.findall(r">drift<.*?<b>([0-9.]+)", cards) == ["0.10", "0.20"]
    assert cards.count(">in use<") == 1
    assert cards.index(">in use<") > cards.index("Step 8")
    for name, title in (("checkpoint-4", "Step 4"), ("result", "Step 8")):
        event = gradio.EventData(None, {"what": "use", "value": name})
        *_, cards = click(folder.name, event)
        assert seen(folder).stands == name
        chosen = cards.index("dd-choice dd-in-use")
        assert cards.index(f"<h3>{title}", chosen) - chosen < 60
