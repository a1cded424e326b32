"""Work of the browser alone: drawing, dialogs, downloads, the clock in many tabs; and axe-core.

Runs and photos are there before the page is opened, and no job begins.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.store import Workspace, write_json
from dora_diffusion.studio.jobs.subjects import add_photos, new_subject
from tests.browser.helpers import ADAPTER, SAMPLES, App, Visit, finished_run, serious
from tests.studio.jobs.helpers import METRICS, about, make, pretend_running
from tests.waiting import STAY

TABS = ("Subject", "Train", "Generate", "Library")
CHOICES = (("base", 0.1, 0.0), ("checkpoint-4", 0.5, 0.1), ("result", 0.7, 0.2))


def write_ranking(workspace: Workspace, run: Path) -> None:
    folder = workspace.ranking(run.name)
    folder.mkdir(parents=True)
    rows = []
    for name, similarity, drift in CHOICES:
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / f"{name}.png")
        row = {"name": name, "similarity": similarity, "drift": drift, "images": [f"{name}.png"]}
        rows.append(row)
    told = {"rows": rows, "missing": [], "notes": [], "suggested": "result"}
    write_json(folder / "comparison.json", told)


@pytest.fixture
def fill(tmp_path: Path) -> Callable[[Workspace], None]:
    """A subject of one photo, a finished run with a ranking and a download, and an image."""

    def prepared(workspace: Workspace) -> None:
        with Image.open(SAMPLES / "bolt_mug" / "01.jpg") as image:
            image.crop((20, 20, 620, 580)).save(tmp_path / "photo.jpg")
        subject = new_subject(workspace, "Bolt mug", "mug")
        add_photos(workspace, subject, [tmp_path / "photo.jpg"])
        run = finished_run(workspace, "sks mug", steps=8, checkpoints=(4, 8))
        (run / "samples").mkdir()
        Image.new("RGB", (64, 64), "teal").save(run / "samples" / "adapted.png")
        write_ranking(workspace, run)
        file = workspace.exports / run.name / "sks-mug-comfyui.safetensors"
        shutil.copyfile(ADAPTER, file)
        job = about(run, "convert", title="Convert sks mug to ComfyUI", output=str(file))
        write_json(job / records.RESULT, {"code": 0})
        text = "a photo of a sks mug\nSteps: 2, Seed: 7, Size: 64x64"
        save_image(Image.new("RGB", (64, 64), "teal"), workspace.images / "made.png", text)

    return prepared


def the_run(app: App) -> Any:
    """The finished run, as it is now."""
    (run,) = (job for job in app.jobs() if job.kind == "train" and job.has_ended)
    return run


def open_editor(page: Visit) -> None:
    page.click("#crops button.thumbnail-item")
    page.click("#edit")
    page.wait_for("#editor .dd-on")
    page.settle()


def test_a_photo_gets_a_caption_a_crop_and_a_mask(visit: Callable[..., Visit], app: App) -> None:
    (stored,) = (app.runs / "subjects").glob("2*/photos")
    whole = (stored / "001.jpg").read_bytes()
    page = visit()
    page.click("#crops button.thumbnail-item")
    page.fill("#caption-rows textarea", "a photo of a sks dog <b>on grass</b>")
    page.page.keyboard.press("Enter")
    page.wait_text("#captions-said", "Saved")
    assert (stored / "001.txt").read_text(
        encoding="utf-8"
    ) == "a photo of a sks dog <b>on grass</b>\n"
    page.click("#edit")
    page.wait_for("#editor .dd-on")
    canvas = page.page.locator("#editor canvas")

    def drag(*points: float) -> None:
        """From and to, as fractions of the image."""
        page.settle()
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x0, x1 = (box["x"] + box["width"] * at for at in points[::2])
        y0, y1 = (box["y"] + box["height"] * at for at in points[1::2])
        page.page.mouse.move(x0, y0)
        page.page.mouse.down()
        page.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
        page.page.mouse.move(x1, y1)
        page.page.mouse.up()

    drag(0.05, 0.1, 0.55, 0.9)
    page.click("#editor [data-tool=paint]")
    drag(0.1, 0.5, 0.4, 0.5)
    page.click("#editor [data-do=apply]")
    page.wait_text("#report", "Crop and mask of 001.jpg saved")
    with Image.open(stored / "001.jpg") as image, Image.open(stored / "001.mask.png") as mask:
        assert image.size == mask.size
        assert abs(image.width - 300) <= 3
        assert abs(image.height - 448) <= 3
        assert mask.getpixel((150, 224)) == 255
        assert mask.getpixel((150, 40)) == 0
    page.wait_text("#crops", "masked")
    open_editor(page)
    page.click("#editor [data-do=restore]")
    page.wait_text("#report", "001.jpg restored")
    assert (stored / "001.jpg").read_bytes() == whole
    # By the keyboard alone: the numbers are what is cropped.
    open_editor(page)
    for side, value in (("left", "10"), ("top", "25"), ("width", "50"), ("height", "50")):
        page.fill(f"#editor [data-side={side}]", value)
    page.page.locator("#editor [data-do=apply]").press("Enter")
    page.wait_text("#report", "Crop and mask of 001.jpg saved")
    with Image.open(stored / "001.jpg") as image:
        assert image.size == (300, 280)
    assert not (stored / "001.mask.png").exists()


@pytest.fixture
def running(app: App) -> Iterator[Path]:
    """A run in training, as its folder tells it: a process that only stays is its worker."""
    folder = make(Workspace(app.runs), "long", token="sks", class_word="mug", max_train_steps=900)
    (folder / "samples").mkdir()
    for name in ("base", "step-000004"):
        Image.new("RGB", (64, 64), "teal").save(folder / "samples" / f"{name}.png")
    write_json(folder / records.PROGRESS, {"phase": "training"})
    train_on(folder, 1, 9)
    with subprocess.Popen([sys.executable, "-c", STAY], stdout=subprocess.DEVNULL) as worker:
        pretend_running(folder, worker)
        app.read_jobs()
        yield folder
        worker.kill()


def train_on(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(METRICS.format(step=step) for step in range(first, last + 1))


def test_progress_is_the_same_after_a_reload_and_in_a_second_tab(
    visit: Callable[..., Visit], running: Path
) -> None:
    first, second = visit(), visit()
    for page in (first, second):
        assert page.opened() == "Train"
        page.wait_text("#status", "long[^]*training[^]*step 9 of 900")
        page.wait_for("#loss-plots svg")
    first.reload()
    assert first.opened() == "Train"
    assert "step 9 of 900" in first.wait_text("#status", "step [1-9]")
    first.page.focus("#samples input")
    for key, title in (("Home", "the base model"), ("ArrowRight", "step 4")):
        first.page.keyboard.press(key)
        first.wait("title => document.querySelector('#samples output').innerText === title", title)
    # Both follow the run, and images that come do not change the one that is looked at.
    first.page.keyboard.press("Home")
    Image.new("RGB", (64, 64), "red").save(running / "samples" / "step-000008.png")
    train_on(running, 10, 12)
    for page in (first, second):
        page.wait_text("#status", "step 12 of 900")
        page.wait("document.querySelectorAll('#samples option').length === 3")
    assert first.text("#samples output") == "the base model"
    assert second.text("#samples output") == "step 8"
    first.wait("document.querySelector('#samples img').naturalWidth > 0")


def test_a_checkpoint_is_chosen_by_its_card(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    page.tab("Train")
    page.wait_for("#checkpoints .dd-choice")
    titles = page.page.locator("#checkpoints h3").all_inner_texts()
    assert titles == ["Base model", "Step 4", "Step 8"]
    page.wait("[...document.querySelectorAll('#checkpoints .dd-choice img')]"
              ".every((image) => image.naturalWidth > 0 || image.scrollIntoView())")  # fmt: skip
    assert "in use" in page.page.locator(".dd-choice").nth(2).inner_text()
    page.click(".dd-choice:nth-child(2) [data-do=use]")
    page.wait_for(".dd-choice.dd-in-use:nth-child(2)")
    assert the_run(app).stands == "checkpoint-4"
    page.tab("Generate")
    page.wait("document.querySelector('#adapter input')?.value.includes('step 4, chosen')")


def test_a_file_is_downloaded_and_a_run_deleted_once_that_is_confirmed(
    visit: Callable[..., Visit], app: App
) -> None:
    run = the_run(app).id
    page = visit()
    page.tab("Library")
    download = page.download("#tasks a.dd-download")
    assert download.suggested_filename == "sks-mug-comfyui.safetensors"
    assert Path(download.path()).read_bytes() == ADAPTER.read_bytes()
    # What is deleted while the browser loads it is an error to it.
    page.wait("document.querySelector('#library img')?.naturalWidth > 0")
    page.press("button", "Delete")
    page.answer = False
    page.click("#delete")
    page.settle()
    (question,) = page.asked
    assert question.startswith(f"Delete {the_run(app).title} with its adapter, ")
    assert (app.runs / run).exists()
    page.answer = True
    page.click("#delete")
    page.settle()
    app.until(lambda: not (app.runs / run).exists())
    app.until(lambda: not (app.runs / "exports" / run).exists())
    # The page hears of it too, though its fields held what is gone.
    page.wait_text("#library-facts", "The library is empty")
    page.wait("!document.querySelector('#convert')?.checkVisibility()")
    page.tab("Generate")
    page.wait("document.querySelector('#adapter input')?.value.startsWith('(no longer in this')")
    assert page.page.evaluate("messages.map((message) => message.textContent)") == []


def test_axe_finds_nothing_serious_on_any_tab(visit: Callable[..., Visit]) -> None:
    """With a subject that is chosen, a run, its files, and an image."""
    page = visit()
    for name in TABS:
        page.tab(name)
        page.settle()
        assert serious(page) == [], name
