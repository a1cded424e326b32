"""The Library tab: thumbnails, what is kept of runs, and adapters that are taken in."""

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
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.views import library
from dora_diffusion.studio.app.views.library import _thumbnail
from dora_diffusion.studio.jobs import records, tasks
from dora_diffusion.studio.jobs.image_generator import GeneratedImage
from dora_diffusion.studio.jobs.image_store import PAGE
from dora_diffusion.studio.jobs.queue import delete_job
from dora_diffusion.studio.jobs.store import write_json
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
    # A name, stars or a state that is another one is another text, for which cards are asked again.
    again = [replace(jobs[0], record=replace(jobs[0].record, stars=3)), *jobs[1:]]
    assert library.refresh(again, None)["library"] != parts["library"]
    assert library.refresh(jobs, None)["library"] == parts["library"]
    assert library.refresh([], None)["library"] == ""
    delete_job(context.workspace, jobs[0].id)
    assert not (small / f"{jobs[0].id}.jpg").exists()
    assert (small / f"{jobs[1].id}.jpg").exists()


def test_a_run_has_stars_a_note_and_what_is_known_of_its_file(context: Context) -> None:
    take, annotate, show = (handler(context, n, "library") for n in ("take", "annotate", "show"))
    cleared, said, _, chosen = take(str(KOHYA), "")
    (job,) = context.jobs(fresh=True)
    assert (cleared, chosen["value"]) == (None, job.id)
    assert "kohya-dora-output is in the library" in said
    assert show(job.id, "")[2:4] == [gradio.skip()] * 2  # what a browser kept stays
    assert show(job.id, "another")[2:4] == [0, ""]
    annotate(job.id, "another", 1, "of another")
    annotate(job.id, job.id, 4, "good at night")
    details, _, stars, note, name, seen = show(job.id, "")
    # The same run under another label leaves what is typed meanwhile.
    assert show(job.id, seen)[2:4] == [gradio.skip()] * 2
    assert (stars, note, name["placeholder"]) == (4, "good at night", "kohya-dora-output")
    for text in ("<dd>kohya</dd>", "DoRA, rank", "<dt>programs</dt>", "<dt>parameters</dt>"):
        assert text in details
    assert "<dt>alpha</dt>" in details
    assert "text_encoder.text_model" not in details  # layers that differ are a range
    parts = library.refresh(context.jobs(fresh=True), None)
    assert parts["library_run"][0]["choices"][0][0].startswith("kohya-dora-output · ")
    assert "★★★★ · done" in parts["library_run"][0]["choices"][0][0]
    assert parts["library_side"][0]["visible"]


def test_a_shared_app_takes_no_adapter_of_a_model_that_it_does_not_offer(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "launch", Launch(share=True, auth="ann:correct horse"))
    for base in ("", "/home/ann/model"):
        with pytest.raises(gradio.Error, match="offers only"):
            handler(context, "take", "library")(str(KOHYA), base)
    assert context.jobs(fresh=True) == ()
    with pytest.raises(gradio.Error, match="offers only"):
        handler(context, "extract", "library")(None, "org/model", "/home/ann/model", "8")


def test_two_adapters_are_compared_at_one_seed(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, asked = context.workspace, list[Any]()
    first, second = (
        tasks.import_adapter(workspace, KOHYA, name, "embedded:tiny-sd", str) for name in "ab"
    )

    def make(request: Any, on_step: Any) -> list[GeneratedImage]:
        asked.append(request)
        path = workspace.images / f"made-{len(asked)}.png"
        note = (f"of {len(asked)}", "of both")
        return [GeneratedImage(save_image(Image.new("RGB", (8, 8)), path), 77, "", note)]

    monkeypatch.setattr(context.generator, "make", make)
    compare = handler(context, "compare", "library")
    slider, said = compare(first, second, "a {subject}", -1)
    assert [request.seed for request in asked] == [None, 77]
    made = [one for request in asked for one in request.uses()]
    assert [Path(use.path).parent.name for use in made] == [first, second]
    plain = asked[0].changed(adapter=asked[1].adapter, seed=77)
    assert plain == asked[1]
    images = [workspace.images / f"made-{number}.png" for number in (1, 2)]
    assert slider["value"] == tuple(map(str, images))
    assert slider["visible"]
    for path, label in zip(images, ("Left: a, seed 77", "Right: b, seed 77"), strict=True):
        assert f"href='{html.address(path)}' download='{path.name}'>{label} " in said
    assert [said.count(text) for text in ("of 1", "of 2", "of both")] == [1, 1, 1]
    # Nothing is made unless both can be.
    for rival in (None, "", first, "gone"):
        with pytest.raises(gradio.Error, match=r"Choose another adapter|no longer exists"):
            compare(first, rival, "a mug", 1)
    with pytest.raises(gradio.Error, match="Write a prompt"):
        compare(first, second, " ", 1)
    assert len(asked) == 2
    parts = library.refresh(context.jobs(fresh=True), second)
    assert [value for _, value in parts["library_rival"][0]["choices"]] == [first]


def test_what_was_combined_is_taken_into_the_library(context: Context) -> None:
    press = handler(context, "press", "library")
    runs = [tasks.import_adapter(context.workspace, KOHYA, name, "org/model", str) for name in "ab"]
    first, second = map(context.job, runs)
    values = (second, "", "", "", "dora")
    made = context.job(tasks.start_task("combine", context.workspace, first, *values))
    event = gradio.EventData(None, {"what": "add", "value": made.id})
    with pytest.raises(gradio.Error, match="has made no adapter"):
        press(None, event)
    Path(made.record.output).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(KOHYA, made.record.output)
    write_json(made.folder / records.RESULT, {"code": 0})
    assert "data-do='add'" in html.task_card(context.job(made.id))
    assert "a and b, combined is in the library" in press(None, event)[1]
    newest = context.jobs(fresh=True)[0]
    assert (newest.title, newest.base) == ("a and b, combined", "org/model")
    assert newest.stands == "result"


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
    assert "waiting" in handler(context, "run", "library", nth=0)(trained, "comfyui")
    job = next(job for job in context.jobs(fresh=True) if job.kind == "convert")
    output = Path(job.record.output)
    assert output.name == f"{trained}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(KOHYA, output)
    records.write_result(job.folder, records.JobResult(0))
    jobs = context.jobs(fresh=True)
    link = f"href='{html.address(output)}' download='{output.name}'"
    assert link in library.refresh(jobs, trained)["tasks"]
    other = tasks.import_adapter(context.workspace, KOHYA, "b", "org/model", str)
    jobs = context.jobs(fresh=True)
    assert link not in library.refresh(jobs, other)["tasks"]
    tasks.start_conversion(context.workspace, context.job(trained), "comfyui")
    assert "waiting" in library.refresh(context.jobs(fresh=True), other)["tasks"]
    assert triggers(context, "card", "library") == {("convert", "click")}


def test_a_run_is_renamed_and_a_smaller_file_of_it_is_taken_in(
    context: Context, trained: str
) -> None:
    *_, facts, cleared = handler(context, "rename", "library")(trained, "Ann's <mug>")
    assert "Ann&#39;s &lt;mug&gt;" in facts
    assert (cleared["value"], cleared["placeholder"]) == ("", "Ann's <mug>")
    assert context.job(trained).title == "Ann's <mug>"
    resize = pressed(context, "resize")
    with pytest.raises(gradio.Error, match="a smaller rank, or an energy, first"):
        resize(trained, "", "", "")
    assert "Resize Ann&#39;s &lt;mug&gt;" in resize(trained, "2", "", "")
    job = next(job for job in context.jobs(fresh=True) if job.kind == "convert")
    Path(job.record.output).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(KOHYA, job.record.output)
    records.write_result(job.folder, records.JobResult(0))
    assert "data-do='add'" in library.refresh(context.jobs(fresh=True), trained)["tasks"]
    event = gradio.EventData(None, {"what": "add", "value": job.id})
    said = handler(context, "press", "library")(trained, event)[1]
    assert "Ann&#39;s &lt;mug&gt;, resized is in the library" in said
    assert context.jobs(fresh=True)[0].title == "Ann's <mug>, resized"
