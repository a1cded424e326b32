"""The Library tab: thumbnails, facts of runs, downloads and merges."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
import gradio

from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import library
from dora_diffusion.studio.app.views.library import _thumbnail
from dora_diffusion.studio.jobs import records, tasks
from dora_diffusion.studio.jobs.image_store import PAGE
from dora_diffusion.studio.jobs.queue import delete_job
from dora_diffusion.studio.jobs.store import GONE
from tests.studio.app.views.helpers import handler, pressed, triggers
from tests.studio.jobs.helpers import ended_run

KOHYA = Path(__file__).parents[3] / "formats/golden/0.1.0/kohya-dora-output.safetensors"


def test_of_a_sheet_one_image_is_shown_without_its_labels(tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 48), (0, 20 * place, 90)) for place in range(6)]
    rows = ["a photo of a sks mug in a place with a long name", "another"]
    sheet = labelled_sheet(images, "After 3 steps", rows, ["seed 0", "seed 1", "seed 2"])
    path = save_image(sheet, tmp_path / "adapted.png", "a mug\nSteps: 2, Seed: 0, Size: 64x48")
    # The first of the last row.
    assert _thumbnail(path).getcolors() == [(256 * 256, (0, 60, 90))]


def test_two_hundred_runs_are_listed_by_opening_one_page_of_their_images(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "photo.jpg"
    Image.effect_noise((640, 480), 80).convert("RGB").save(image)
    run = ended_run(context.workspace, (2,), 4).folder
    (run / "photos").mkdir()
    os.link(image, run / "photos" / "001.jpg")
    for _ in range(199):
        shutil.copytree(run, context.workspace.new_job(), copy_function=os.link)
    opened, scanned = list[Path](), list[str]()
    read, scan = library._thumbnail, os.scandir

    def counting(path: Path) -> Any:
        opened.append(path)
        return read(path)

    jobs = context.jobs(fresh=True)
    monkeypatch.setattr(library, "_thumbnail", counting)
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scan(path))
    monkeypatch.setattr(context, "jobs", lambda: jobs)
    # The clock looks at none of them, and not into their folders.
    parts = library.refresh(jobs, None)
    assert len(parts["library_run"][0]["choices"]) == 200
    assert (opened, scanned) == ([], [])
    page = library.page_of(context, {"from": 0, "count": 0})
    assert (page["count"], page["total"]) == (PAGE, 200)
    assert len(opened) == PAGE
    assert page["cards"].count("thumbnails/") == PAGE
    small = context.workspace.thumbnails
    assert sorted(os.listdir(small)) == sorted(f"{job.id}.jpg" for job in jobs[:PAGE])
    opened.clear()
    assert library.page_of(context, {"from": 0, "count": 0}) == page
    assert opened == []
    assert library.page_of(context, {"from": 2 * PAGE, "count": 0})["count"] == PAGE
    assert len(opened) == PAGE
    # A name or a state that is another one is another text, for which cards are asked again.
    again = [replace(jobs[0], record=replace(jobs[0].record, title="Rex")), *jobs[1:]]
    assert library.refresh(again, None)["library"] != parts["library"]
    assert library.refresh(jobs, None)["library"] == parts["library"]
    assert library.refresh([], None)["library"] == ""
    delete_job(context.workspace, jobs[0].id)
    assert not (small / f"{jobs[0].id}.jpg").exists()
    assert (small / f"{jobs[1].id}.jpg").exists()


@pytest.fixture
def trained(context: Context) -> str:
    """A run of this app with an adapter."""
    folder = ended_run(context.workspace, (), 8, code=0).folder
    shutil.copyfile(KOHYA, folder / "pytorch_lora_weights.safetensors")
    settings = (folder / records.SETTINGS).read_text(encoding="utf-8")
    settings = settings.replace("instance_data_dir: null", "instance_data_dir: photos")
    settings = settings.replace("instance_prompt: null", "instance_prompt: a sks mug")
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    context.jobs(fresh=True)
    return folder.name


def test_a_download_has_a_link_and_a_model_card(context: Context, trained: str) -> None:
    card = handler(context, "card", "library")(trained)
    (file,) = context.workspace.exports.glob(f"{trained}/*README.md")
    assert f"href='{html.address(file)}' download='{file.name}'>Model card" in card
    assert "waiting" in handler(context, "convert", "library")(trained, "comfyui", "")
    job = next(job for job in context.jobs(fresh=True) if job.kind == "convert")
    output = Path(job.record.output)
    assert output.name == f"{trained}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(KOHYA, output)
    records.write_result(job.folder, records.JobResult(0))
    jobs = context.jobs(fresh=True)
    link = f"href='{html.address(output)}' download='{output.name}'"
    assert link in library.refresh(jobs, trained)["tasks"]
    tasks.start_merge(context.workspace, context.job(trained), "0.5")
    assert "Merge " in library.refresh(context.jobs(fresh=True), trained)["tasks"]
    assert library.refresh(context.jobs(fresh=True), None)["library_side"][0]["visible"]
    assert triggers(context, "card", "library") == {("convert", "click")}


def test_a_run_is_shown_with_what_is_known_of_its_file(context: Context, trained: str) -> None:
    show = handler(context, "show", "library")
    details = show(trained)
    for text in ("<dd>kohya</dd>", "DoRA, rank", "<dt>programs</dt>", "<dt>parameters</dt>"):
        assert text in details
    assert "<dt>alpha</dt>" in details
    assert "text_encoder.text_model" not in details  # layers that differ are a range
    assert "The library is empty" in show(None)
    assert "was deleted" in show(GONE)


def test_the_facts_of_a_run_follow_its_state_and_its_chosen_checkpoint(context: Context) -> None:
    events = {("library", "change"), ("library-run", "change")}
    assert triggers(context, "show", "library") == events
    run = ended_run(context.workspace, (2, 4), 4)
    states: list[dict[str, Any]] = [{}, {"state": "running"}, {"chosen": "checkpoint-2"}]
    changes = [*states, {"total": 9}]
    stamps = {library.refresh([replace(run, **change)], None)["library"] for change in changes}
    assert len(stamps) == len(changes)


def test_a_run_is_merged_at_a_strength(context: Context, trained: str) -> None:
    merge = pressed(context, "export")
    assert "Merge " in merge(trained, "0.5")
    [job] = (job for job in context.jobs(fresh=True) if job.kind == "export")
    assert " --strength 0.5" in job.record.command.replace(" \\\n   ", "")
    with pytest.raises(gradio.Error, match="must be between -10 and 10"):
        merge(trained, "11")
    event = gradio.EventData(None, {"what": "stop", "value": job.id})
    assert "stopped" in handler(context, "stop", "library")(trained, event)
