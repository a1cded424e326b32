"""The app as a person uses it: headless Chromium against the real server and real training.

The tests tell one story on one server, in their order: they share its runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
# The tab and the server of conftest.py.
Visit = App = Any


def images_of(app: App) -> list[Path]:
    return sorted((app.runs / "images").glob("*.png"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_an_empty_start_is_refused_in_plain_words(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Train")
    page.wait_text("body", "[Nn]o subject yet")
    page.click("#start")
    assert "add photos in the Subject tab" in page.toast()
    page.wait_text("#status", "Nothing trained yet[^]*Choose a subject")
    page.tab("Generate")
    page.wait_text("body", "No images yet[^]*Generate images")
    page.tab("Library")
    page.wait_text("#library-facts", "The library is empty[^]*Train tab")
    assert page.page.locator("#convert:visible").count() == 0


def test_uploads_are_checked_file_by_file(
    visit: Callable[..., Visit], app: App, tmp_path: Path
) -> None:
    good = []
    for number in range(1, 4):
        with Image.open(ROOT / "samples" / "bolt_mug" / f"{number:02d}.jpg") as image:
            good.append(tmp_path / f"good{number}.jpg")
            image.crop((20, 20, 620, 580)).save(good[-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera of Ann"
    turned = tmp_path / "turned.jpg"
    Image.effect_noise((120, 60), 70).convert("RGB").save(turned, exif=exif)
    fake, vector, huge, twin, blurred = (
        tmp_path / name
        for name in ("fake.jpg", "drawing.svg", "huge.png", "twin.jpg", "blurred.jpg")
    )
    fake.write_bytes(b"this is text")
    vector.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    Image.new("1", (15_000, 14_000)).save(huge)
    with Image.open(good[0]) as image:
        image.resize((620, 580)).save(twin)
    smooth = Image.linear_gradient("L").resize((600, 600)).convert("RGB")
    smooth.paste("white", (200, 200, 400, 400))
    smooth.filter(ImageFilter.GaussianBlur(12)).save(blurred)
    before = {path: path.read_bytes() for path in [*good, turned, twin, blurred]}
    page = visit()
    page.page.set_input_files(
        "#upload input[type=file]", [*good, turned, fake, vector, huge, twin, blurred]
    )
    report = page.wait_text("#report", "6 photos added")
    assert "fake.jpg: not a JPEG" in report
    assert "drawing.svg: not a JPEG" in report
    assert re.search(r"huge\.png.*megapixels", report)
    assert re.search(r"001\.jpg and 005\.jpg are nearly the same photo", report)
    assert "006.jpg: looks blurred" in report
    assert "004.jpg: 60 x 120 is smaller" in report
    page.wait("document.querySelectorAll('#crops img').length === 6")
    (stored,) = (app.runs / "subjects").glob("2*/photos")
    with Image.open(stored / "004.jpg") as image:
        assert image.size == (60, 120)
        assert dict(image.getexif()) == {}
    assert {path: path.read_bytes() for path in before} == before


def open_photo(page: Visit, place: int = 0) -> None:
    page.click("#crops button.thumbnail-item", place)
    page.wait_for("#edit")


def test_a_photo_gets_a_caption_a_crop_and_a_mask(visit: Callable[..., Visit], app: App) -> None:
    (stored,) = (app.runs / "subjects").glob("2*/photos")
    whole = (stored / "001.jpg").read_bytes()
    page = visit()
    open_photo(page)
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
    open_photo(page)
    page.click("#edit")
    page.wait_for("#editor .dd-on")
    page.click("#editor [data-do=restore]")
    page.wait_text("#report", "001.jpg restored")
    assert (stored / "001.jpg").read_bytes() == whole
    # By the keyboard alone: the numbers are what is cropped.
    open_photo(page)
    page.click("#edit")
    page.wait_for("#editor .dd-on")
    for side, value in (("left", "10"), ("top", "25"), ("width", "50"), ("height", "50")):
        page.fill(f"#editor [data-side={side}]", value)
    page.page.locator("#editor [data-do=apply]").press("Enter")
    page.wait_text("#report", "Crop and mask of 001.jpg saved")
    with Image.open(stored / "001.jpg") as image:
        assert image.size == (300, 280)
    open_photo(page)
    page.click("#edit")
    page.wait_for("#editor .dd-on")
    page.click("#editor [data-do=restore]")
    page.wait_text("#report", "001.jpg restored")
    assert (stored / "001.jpg").read_bytes() == whole
    assert not (stored / "001.mask.png").exists()


def set_up_run(page: Visit, steps: int) -> None:
    """Fill the Train tab for the sample subject."""
    page.tab("Train")
    page.wait("document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'")
    page.check("Fast")
    # What is typed before the preset has been filled in would be written over.
    page.wait_text("#plan", "--max_train_steps 50 ")
    page.unfold("Advanced settings", "Optimization", "Validation", "Output")
    for name, value in (
        ("max_train_steps", steps),
        ("checkpointing_steps", 4),
        ("validation_steps", 4),
        ("num_validation_images", 1),
        ("validation_inference_steps", 2),
    ):
        page.set_setting(name, str(value))


@pytest.fixture(scope="module")
def started(app: App, open_tab: Callable[..., Visit]) -> str:
    """A long run of a sample subject, started by hand in the page; its folder's name."""
    page = open_tab()
    page.click("[data-value=bolt_mug]")
    page.wait_text("#report", "ready to train")
    set_up_run(page, 100_000)
    page.click("#start")
    page.wait_text("#train-said", "Started")
    page.wait_text("#status", "step [1-9]")
    page.close()
    (folder,) = app.runs.glob("2*")
    return folder.name


def test_progress_is_the_same_after_a_reload_and_in_a_second_tab(
    visit: Callable[..., Visit], app: App, started: str
) -> None:
    first, second = visit(), visit()
    for page in (first, second):
        page.tab("Train")
        page.wait_text("#status", "Bolt mug[^]*training[^]*step [1-9]")
        page.wait_for("#loss polyline.dd-smooth")
    first.reload()
    first.tab("Train")
    at = first.wait_text("#status", "step [1-9]")
    first.wait_for("#samples img")
    # Both follow the same run: each gets to a step that is later than what the other has shown.
    for page, seen in ((second, at), (first, second.text("#status"))):
        step = int(re.search(r"step (\d+)", seen)[1])
        page.wait(
            "at => Number(/step (\\d+)/.exec(document.querySelector('#status').innerText)[1]) > at",
            step,
        )
    # Saved and sampled when it is asked for, and flipped through by the keys.
    first.click("#save-now")
    first.click("#sample-now")

    def sampled_between() -> int:
        names = (path.stem for path in (app.runs / started / "samples").glob("step-*.png"))
        steps = [step for name in names if (step := int(name.removeprefix("step-"))) % 4]
        if not steps:  # the step at which it was asked for is one of the settings', too
            first.click("#sample-now")
        return steps[0] if steps else 0

    title = f"step {app.until(sampled_between)}"
    first.wait("title => [...document.querySelectorAll('#samples option')]"
               ".some(option => option.text === title)", title)  # fmt: skip
    first.page.focus("#samples input")
    for key, place in (("Home", 0), ("ArrowRight", 1)):
        first.page.keyboard.press(key)
        first.wait(f"document.querySelector('#samples output').innerText === "
                   f"document.querySelectorAll('#samples option')[{place}].text")  # fmt: skip
    first.wait("document.querySelector('#samples img').naturalWidth > 0")
    # It is killed later, from a checkpoint: until then it need not take a core.
    app.until(lambda: bool(state_of(app, started).checkpoints))
    (worker,) = app.workers()
    worker.suspend()


@pytest.fixture(scope="module")
def second(app: App, open_tab: Callable[..., Visit], started: str) -> str:
    """A short run that was started while the long one was running; its folder's name."""
    page = open_tab()
    set_up_run(page, 8)
    page.click("#start")
    page.wait_text("#train-said", "number 1 in the queue")
    page.wait_text("#status", "number 1 in the queue")
    page.close()
    first, other = sorted(folder.name for folder in app.runs.glob("2*"))
    assert first == started
    return other


def state_of(app: App, job_id: str) -> Any:
    from dora_diffusion.studio.jobs.snapshot import read_job

    job = read_job(app.runs / job_id)
    assert job is not None
    return job


def choose_run(page: Visit, place: int) -> None:
    """Pick a run by its place in the list, newest first."""
    page.choose("#run", nth=place)


def test_a_killed_worker_shows_as_crashed_and_the_queue_goes_on(
    visit: Callable[..., Visit], app: App, started: str, second: str
) -> None:
    page = visit()
    page.tab("Train")
    choose_run(page, 1)
    app.until(lambda: bool(state_of(app, started).checkpoints))
    page.wait_text("#status", "step [1-9]")
    (worker,) = app.workers()
    app.may_fail.add(started)
    worker.kill()
    page.wait_text("#status", "crashed[^]*Resume continues")
    choose_run(page, 0)
    page.wait_text("#status", "Write .sks mug. in a prompt")
    assert state_of(app, second).state == "done"
    # A page that has been open all the while, with another run chosen, goes on to this one.
    page.click("#to-generate")
    page.wait_for("#make:visible")
    page.wait("document.querySelector('#adapter input')?.value.includes('step 8')")
    set_up_images(page)
    press(page, app, "#side-by-side", 2)


def test_resume_goes_on_counting_and_stop_saves(
    visit: Callable[..., Visit], app: App, started: str, second: str
) -> None:
    app.until(lambda: state_of(app, second).state == "done")
    at = int(state_of(app, started).checkpoints[-1].removeprefix("checkpoint-"))
    page = visit()
    page.tab("Train")
    choose_run(page, 1)
    page.wait_text("#status", "crashed")
    page.click("#resume")
    # Until the run has begun again, its files tell of the attempt that crashed, which began at 0.
    app.until(lambda: state_of(app, started).progress.first_step == at)
    app.until(lambda: state_of(app, started).step > at)
    page.click("#stop")
    page.wait_text("#status", "stopped")
    assert page.text("#run-said").strip() == ""  # nothing that was true only for a while
    stopped = state_of(app, started)
    assert stopped.checkpoints[-1] == f"checkpoint-{stopped.step}"
    page.unfold("Rename or remove")
    page.click("#remove")
    app.until(lambda: not (app.runs / started).exists())


def test_checkpoints_are_compared_and_one_is_chosen(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    page.tab("Train")
    choose_run(page, 0)
    page.click("#rank-checkpoints")
    page.wait_for("#checkpoints .dd-choice")
    # As soon as its job has ended, nothing of it is drawn anew.
    page.wait_for("#rank-checkpoints")
    titles = page.page.locator("#checkpoints h3").all_inner_texts()
    assert titles == ["Base model", "Step 4", "Step 8"]
    shown = page.text("#checkpoints")
    assert len(re.findall(r"similarity to the true subject\s+-?[01]\.\d\d", shown)) == 3
    assert len(re.findall(r"drift\s+[01]\.\d\d", shown)) == 2
    page.wait("[...document.querySelectorAll('#checkpoints .dd-choice img')]"
              ".every((image) => image.naturalWidth > 0 || image.scrollIntoView())")  # fmt: skip
    assert "in use" in page.page.locator(".dd-choice").nth(2).inner_text()
    page.click(".dd-choice:nth-child(2) [data-do=use]")
    page.wait_for(".dd-choice.dd-in-use:nth-child(2)")
    assert state_of(app, second).stands == "checkpoint-4"
    page.tab("Generate")
    page.wait("document.querySelector('#adapter input')?.value.includes('step 4, chosen')")
    page.tab("Train")
    page.click(".dd-choice:nth-child(3) [data-do=use]")
    page.wait_for(".dd-choice.dd-in-use:nth-child(3)")
    assert state_of(app, second).stands == "result"


def set_slider(page: Visit, name: str, value: str) -> None:
    field = page.page.get_by_label(f"number input for {name}")
    page.fill_in(field, value)
    field.press("Tab")


def press(page: Visit, app: App, selector: str, count: int = 1) -> list[Path]:
    """Click a button of the Generate tab; the new images, once the page shows the last."""
    before = set(images_of(app))
    page.click(selector)
    app.until(lambda: len(images_of(app)) == len(before) + count)
    new = [path for path in images_of(app) if path not in before]
    # Among the results: the clock may bring it to the list of all images before.
    page.wait_for(f":is(#images, #slider) img[src*='{new[-1].name}']")
    # The button does nothing before the page has heard that its event has ended.
    page.settle()
    return new


def set_up_images(page: Visit) -> None:
    page.tab("Generate")
    page.fill("#seed input", "7")
    page.press("button", "Steps, guidance")
    set_slider(page, "Steps", "2")
    set_slider(page, "Images", "1")


def test_images_repeat_compare_and_say_how_they_were_made(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    from dora_diffusion.sampling.images import parse_parameters, read_parameters

    page = visit()
    set_up_images(page)
    (first,), (again,) = press(page, app, "#make"), press(page, app, "#make")
    assert pixels(first) == pixels(again)
    found = parse_parameters(read_parameters(first) or "")
    assert (found["Seed"], found["Steps"], found["Prompt"]) == (
        "7", "2", "a photo of a sks mug in the snow",
    )  # fmt: skip
    pair = press(page, app, "#side-by-side", 2)
    assert page.page.locator("#slider img").count() == 2
    base = next(path for path in pair if "<lora:" not in (read_parameters(path) or ""))
    set_slider(page, "Strength", "0")
    (zero,) = press(page, app, "#make")
    assert pixels(zero) == pixels(base) != pixels(first)
    page.press("button", "Grid of checkpoints")
    page.fill("#grid-values-2 input, #grid-values-2 textarea", "0, 1")
    (grid,) = press(page, app, "#grid")
    with Image.open(grid) as image:
        assert image.width >= 2 * 64 + 2  # two strengths
        assert image.height > 2 * 64  # two checkpoints, under labels
    page.press("button", "Load settings from an image")
    page.fill("#seed input", "99")
    page.page.set_input_files("#load-png input[type=file]", first)
    page.wait("document.querySelector('#seed input').value === '7'")
    wrong = app.runs.parent / "plain.png"
    Image.new("RGB", (8, 8)).save(wrong)
    page.click("#load-png [aria-label=Clear], #load-png [aria-label=Remove]")
    page.page.set_input_files("#load-png input[type=file]", wrong)
    assert "does not say how it was made" in page.toast()


def test_the_library_gives_files_merges_and_remembers(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    from dora_diffusion.formats.files.stream import read_header

    page = visit()
    page.tab("Library")
    page.wait_for("#library img")
    page.wait_text("#library-facts", "sks mug")
    page.click("#convert")
    page.wait_for("#files a.dd-download")  # the model card
    page.wait_for("#tasks a.dd-download")
    download = page.download("#tasks a.dd-download")
    assert download.suggested_filename == f"sks-mug-{second[:15]}-step-8-comfyui.safetensors"
    assert len(read_header(Path(download.path())).specs) > 10
    page.press("button", "One file without an adapter")
    page.click("#export")
    page.wait_text("#tasks", "Download sks-mug-2[^ ]*merged")
    (merged,) = app.runs.glob("exports/*/*merged.safetensors")
    assert any(name.startswith("model.diffusion_model.") for name in read_header(merged).specs)
    download = page.download("#tasks a.dd-download")
    assert download.suggested_filename == merged.name
    assert Path(download.path()).stat().st_size == merged.stat().st_size


def test_methods_are_compared_from_a_form(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    """Started, shown with its line, and stopped: a report takes minutes."""
    page = visit()
    page.tab("Compare")
    page.wait_text("#study-status", "Nothing compared yet")
    page.click("#study-subjects input[type=checkbox]")
    page.fill("#study-steps input", "2")
    page.click("#study")
    page.wait_text("#study-status", "dora, lora on [^]*dora_diffusion compare .*study.yaml")
    app.until(lambda: app.jobs()[0].progress.phase == "training and measuring")
    page.click("#study-status [data-do=stop]")
    page.wait_text("#study-status", "stopped[^]*Continue")
    assert app.jobs()[0].kind == "compare"


def test_a_merged_model_can_be_loaded_and_makes_the_adapter_s_images(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    set_up_images(page)
    (adapted,) = press(page, app, "#make")
    page.choose("#adapter", "Merge")
    (merged,) = press(page, app, "#make")
    # The sum is rounded once more where it is stored.
    differences = [abs(a - b) for a, b in zip(pixels(adapted), pixels(merged), strict=True)]
    assert max(differences) <= 2


def test_publishing_says_what_is_missing(visit: Callable[..., Visit], second: str) -> None:
    page = visit()
    page.tab("Library")
    page.wait_text("#library-facts", "sks mug")
    page.press("button", "Publish on the")
    page.fill("#library-Repository input, #library-Repository textarea", "ann/mug")
    page.click("#push")
    assert "HF_HUB_OFFLINE is set" in page.toast()


def test_a_restart_of_the_app_forgets_nothing(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    app.kill()
    app.start()
    page = visit()
    page.tab("Train")
    page.wait_text("#jobs", "done")
    page.tab("Train")
    page.wait_for("#checkpoints .dd-choice")
    page.tab("Library")
    page.wait_for("#library img")
    page.tab("Generate")
    newest = max(images_of(app), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name in page.page.locator("#history img").first.get_attribute("src")
    page.click("#history .dd-sample")
    page.wait_for(f"#images img[src*='{newest.name}']")
    page.wait_text("#parameters", "Steps: 2")


def test_a_finished_run_continues_with_more_steps(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    page.tab("Train")
    page.fill("#more input", "4")
    page.click("#continue")
    page.wait_text("#status", "done[^]*step 12 of 12")
    found = state_of(app, second)
    assert (found.state, found.progress.first_step, found.checkpoints[-1]) == (
        "done", 8, "checkpoint-12",
    )  # fmt: skip


def test_a_phone_has_all_tabs_and_needs_no_sideways_scrolling(
    visit: Callable[..., Visit], second: str
) -> None:
    page = visit(390)
    for name, shown in (
        ("Subject", "#upload"), ("Train", "#status"), ("Generate", "#make"),
        ("Library", "#library-facts"), ("Compare", "#study"),
    ):  # fmt: skip
        page.tab(name)
        page.wait_for(f"{shown}:visible")
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_delete_asks_and_removes_everything(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    page.tab("Library")
    # What is deleted while the browser loads it is an error to it.
    page.wait("document.querySelector('#library img')?.naturalWidth > 0")
    page.press("button", "Delete")
    page.click("#delete")
    app.until(lambda: not (app.runs / second).exists())
    app.until(lambda: not (app.runs / "exports" / second).exists())
    # The page hears of it too, though its fields held what is gone.
    page.wait_text("#library-facts", "The library is empty")
    page.wait("!document.querySelector('#convert')?.checkVisibility()")
    page.tab("Generate")
    page.wait("document.querySelector('#adapter input')?.value === ''")
    assert page.page.evaluate("messages.map((message) => message.textContent)") == []
