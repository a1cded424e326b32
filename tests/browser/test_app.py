"""The app as a person uses it: headless Chromium against the real server and real training.

The tests tell one story on one server, in their order: they share its runs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
# Nothing that Chromium does by itself may look for a network.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LIMIT = 240_000.0  # milliseconds; only for a machine that hangs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium"),
    pytest.mark.skipif(
        not (ROOT / "dora_diffusion" / "embedded" / "tiny-sd" / "model_index.json").is_file(),
        reason="the embedded model is not there",
    ),
]


class App:
    """The server as a process of its own, as ``python app.py`` starts it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "app.py", "--runs_dir", str(self.runs)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        self.url = line.split()[1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def workers(self) -> list[int]:
        """Living workers' pids."""
        from dora_diffusion.app.jobs import worker_of

        found = (worker_of(folder) for folder in self.runs.glob("2*"))
        return [worker[0] for worker in found if worker is not None]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    one = App(tmp_path_factory.mktemp("app") / "runs")
    one.start()
    yield one
    one.end()
    for pid in one.workers():
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield one
        one.close()


class Visit:
    """One tab of the browser, and what must stay empty while it is used."""

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(LIMIT)
        self.wrong: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(url)
        self.page.wait_for_selector("#upload")
        # The page's load event fills the fields.
        self.page.wait_for_selector(".dd-connecting", state="detached")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(message.text)

    def _request(self, request: Any) -> None:
        outside = request.url.startswith("http") and "//127.0.0.1:" not in request.url
        if outside:
            self.wrong.append(f"left the machine: {request.url}")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def wait_text(self, selector: str, pattern: str) -> str:
        """Wait until an element's text matches."""
        self.page.wait_for_function(
            "([s, p]) => new RegExp(p).test(document.querySelector(s)?.innerText ?? '')",
            arg=[selector, pattern],
        )
        return self.text(selector)

    def toast(self) -> str:
        box = self.page.locator(".toast-wrap").first
        box.locator(".toast-body").first.wait_for()
        text = str(box.inner_text())
        self.page.locator(".toast-close").first.click()
        return text

    def set_number(self, label: str, value: str) -> None:
        field = self.page.get_by_label(label, exact=False).first
        field.fill(value)
        field.press("Tab")

    def reload(self) -> None:
        """Load the page again. What that cuts off complains, which is no fault of the page."""
        before = list(self.wrong)
        self.page.reload()
        self.page.wait_for_selector("#upload")
        self.page.wait_for_selector(".dd-connecting", state="detached")
        self.wrong = before

    def close(self) -> None:
        assert self.wrong == []
        self.page.close()


@pytest.fixture
def visit(app: App, browser: Any) -> Iterator[Callable[..., Visit]]:
    opened: list[Visit] = []

    def open_page(width: int = 1280) -> Visit:
        opened.append(Visit(browser, app.url, width))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()


def pictures(app: App) -> list[Path]:
    return sorted((app.runs / "pictures").glob("*.png"))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_an_empty_start_is_refused_in_plain_words(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Train")
    page.wait_text("body", "[Nn]o subject yet")
    page.page.click("#start")
    assert "add photos in the Subject tab" in page.toast()
    page.wait_text("#status", "Nothing trained yet[^]*Choose a subject")
    page.tab("Generate")
    page.wait_text("body", "No pictures yet[^]*Make pictures")
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
    vector.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    Image.new("1", (7000, 7000)).save(huge)
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
    assert page.page.locator("#crops img").count() == 6
    (stored,) = (app.runs / "subjects").glob("2*/photos")
    with Image.open(stored / "004.jpg") as image:
        assert image.size == (60, 120)
        assert dict(image.getexif()) == {}
    assert {path: path.read_bytes() for path in before} == before


def open_photo(page: Visit, place: int = 0) -> None:
    page.page.locator("#crops button.thumbnail-item").nth(place).click()
    page.page.wait_for_selector("#caption textarea")


def test_a_photo_gets_a_caption_a_crop_and_a_mask(visit: Callable[..., Visit], app: App) -> None:
    (stored,) = (app.runs / "subjects").glob("2*/photos")
    whole = (stored / "001.jpg").read_bytes()
    page = visit()
    open_photo(page)
    page.page.locator("#caption textarea").fill("a photo of a sks dog <b>on grass</b>")
    page.page.get_by_role("button", name="Save caption").click()
    page.wait_text("#report", "Caption of 001.jpg saved")
    assert (stored / "001.txt").read_text() == "a photo of a sks dog <b>on grass</b>\n"
    page.page.click("#edit")
    page.page.wait_for_selector("#editor .dd-on")
    canvas = page.page.locator("#editor canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()

    def drag(*points: float) -> None:
        """From and to, as fractions of the picture."""
        x0, x1 = (box["x"] + box["width"] * at for at in points[::2])
        y0, y1 = (box["y"] + box["height"] * at for at in points[1::2])
        page.page.mouse.move(x0, y0)
        page.page.mouse.down()
        page.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
        page.page.mouse.move(x1, y1)
        page.page.mouse.up()

    drag(0.05, 0.1, 0.55, 0.9)
    page.page.click("#editor [data-tool=paint]")
    drag(0.1, 0.5, 0.4, 0.5)
    page.page.click("#editor [data-do=apply]")
    page.wait_text("#report", "Crop and mask of 001.jpg saved")
    with Image.open(stored / "001.jpg") as image, Image.open(stored / "001.mask.png") as mask:
        assert image.size == mask.size
        assert abs(image.width - 300) <= 3
        assert abs(image.height - 448) <= 3
        assert mask.getpixel((150, 224)) == 255
        assert mask.getpixel((150, 40)) == 0
    page.wait_text("#crops", "masked")
    open_photo(page)
    page.page.click("#edit")
    page.page.wait_for_selector("#editor .dd-on")
    page.page.click("#editor [data-do=restore]")
    page.wait_text("#report", "001.jpg is as it was")
    assert (stored / "001.jpg").read_bytes() == whole
    assert not (stored / "001.mask.png").exists()


def set_up_run(page: Visit, steps: int) -> None:
    """Fill the Train tab for the sample subject."""
    page.tab("Train")
    page.page.wait_for_function(
        "document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'"
    )
    page.page.get_by_label("Fast").check()
    page.page.get_by_role("button", name="Advanced settings").click()
    page.page.get_by_role("button", name="Length and samples").click()
    for name, value in (
        ("max_train_steps", steps),
        ("checkpointing_steps", 4),
        ("validation_steps", 4),
        ("num_validation_images", 1),
        ("validation_inference_steps", 2),
    ):
        page.set_number(name, str(value))
    page.wait_text("#plan", f"--max_train_steps {steps} [^]*--validation_inference_steps 2")


@pytest.fixture(scope="module")
def started(app: App, browser: Any) -> str:
    """A long run of a sample subject, started by hand in the page; its folder's name."""
    page = Visit(browser, app.url)
    page.page.click("#sample-bolt_mug")
    page.wait_text("#report", "ready to train")
    set_up_run(page, 100_000)
    page.page.click("#start")
    page.wait_text("#train-said", "Started")
    page.wait_text("#status", "step [1-9]")
    page.close()
    (folder,) = app.runs.glob("2*")
    return folder.name


def test_progress_is_the_same_after_a_reload_and_in_a_second_tab(
    visit: Callable[..., Visit], started: str
) -> None:
    first, second = visit(), visit()
    for page in (first, second):
        page.tab("Train")
        page.wait_text("#status", "sks mug[^]*training[^]*step [1-9]")
        page.page.wait_for_selector("#loss polyline.dd-smooth")
    first.reload()
    first.tab("Train")
    at = first.wait_text("#status", "step [1-9]")
    first.page.wait_for_selector("#samples img")
    # Both follow the same run: each gets to a step that is later than what the other has shown.
    for page, seen in ((second, at), (first, second.text("#status"))):
        step = int(re.search(r"step (\d+)", seen)[1])
        page.page.wait_for_function(
            "at => Number(/step (\\d+)/.exec(document.querySelector('#status').innerText)[1]) > at",
            arg=step,
        )


@pytest.fixture(scope="module")
def second(app: App, browser: Any, started: str) -> str:
    """A short run that was started while the long one was running; its folder's name."""
    page = Visit(browser, app.url)
    set_up_run(page, 8)
    page.page.click("#start")
    page.wait_text("#train-said", "number 1 in the queue")
    page.wait_text("#status", "number 1 in the queue")
    page.close()
    first, other = sorted(folder.name for folder in app.runs.glob("2*"))
    assert first == started
    return other


def state_of(app: App, job_id: str) -> Any:
    from dora_diffusion.app.snapshot import read_job

    job = read_job(app.runs / job_id)
    assert job is not None
    return job


def choose_run(page: Visit, place: int) -> None:
    """Pick a run by its place in the list, newest first."""
    page.page.locator("#run input").click()
    page.page.locator("#run [role=option]").nth(place).click()


def test_a_killed_worker_shows_as_crashed_and_the_queue_goes_on(
    visit: Callable[..., Visit], app: App, started: str, second: str
) -> None:
    page = visit()
    page.tab("Train")
    choose_run(page, 1)
    wait_for(lambda: bool(state_of(app, started).checkpoints))
    page.wait_text("#status", "step [1-9]")
    (worker,) = app.workers()
    os.kill(worker, signal.SIGKILL)
    page.wait_text("#status", "crashed[^]*Resume goes on")
    choose_run(page, 0)
    page.wait_text("#status", "Write .sks mug. in a prompt")
    assert state_of(app, second).state == "done"
    # A page that has been open all the while, with another run chosen, goes on to this one.
    page.page.click("#to-generate")
    page.page.wait_for_selector("#make:visible")
    page.page.wait_for_function("document.querySelector('#adapter input').value.includes('step 8')")
    set_up_pictures(page)
    press(page, app, "#compare", 2)


def test_resume_goes_on_counting_and_stop_saves(
    visit: Callable[..., Visit], app: App, started: str, second: str
) -> None:
    wait_for(lambda: state_of(app, second).state == "done")
    at = int(state_of(app, started).checkpoints[-1].removeprefix("checkpoint-"))
    page = visit()
    page.tab("Train")
    choose_run(page, 1)
    page.wait_text("#status", "crashed")
    page.page.click("#resume")
    # Until the run has begun again, its files tell of the attempt that crashed, which began at 0.
    wait_for(lambda: state_of(app, started).progress.get("first_step") == at)
    wait_for(lambda: state_of(app, started).step > at)
    page.page.click("#stop")
    page.wait_text("#status", "stopped")
    stopped = state_of(app, started)
    assert stopped.checkpoints[-1] == f"checkpoint-{stopped.step}"
    page.page.click("#remove")
    wait_for(lambda: not (app.runs / started).exists())


def test_checkpoints_are_compared_and_one_is_chosen(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    page.tab("Train")
    choose_run(page, 0)
    page.page.click("#compare-checkpoints")
    page.page.wait_for_selector("#checkpoints .dd-choice")
    titles = page.page.locator("#checkpoints h3").all_inner_texts()
    assert titles == ["Base model", "Step 4", "Step 8"]
    shown = page.text("#checkpoints")
    assert len(re.findall(r"similarity\s+-?[01]\.\d\d", shown)) == 3
    assert len(re.findall(r"drift\s+[01]\.\d\d", shown)) == 2
    for place in range(3):
        for picture in page.page.locator("#checkpoints .dd-choice").nth(place).locator("img").all():
            picture.scroll_into_view_if_needed()
            page.page.wait_for_function("e => e.naturalWidth > 0", arg=picture.element_handle())
    assert "in use" in page.page.locator(".dd-choice").nth(2).inner_text()
    page.page.locator(".dd-choice").nth(1).locator("[data-do=use]").click()
    page.page.wait_for_selector(".dd-choice.dd-in-use:nth-child(2)")
    assert state_of(app, second).stands == "checkpoint-4"
    page.tab("Generate")
    page.page.wait_for_function(
        "document.querySelector('#adapter input').value.includes('step 4, chosen')"
    )
    page.tab("Train")
    page.page.locator(".dd-choice").nth(2).locator("[data-do=use]").click()
    page.page.wait_for_selector(".dd-choice.dd-in-use:nth-child(3)")
    assert state_of(app, second).stands == "result"


def set_slider(page: Visit, name: str, value: str) -> None:
    field = page.page.get_by_label(f"number input for {name}")
    # A slider that was just unfolded may be drawn once more, with the value that it had.
    wait_for(lambda: _filled(page, field, value))


def _filled(page: Visit, field: Any, value: str) -> bool:
    field.fill(value)
    field.press("Tab")
    page.page.wait_for_timeout(500)
    return bool(field.input_value() == value)


def press(page: Visit, app: App, selector: str, count: int = 1) -> list[Path]:
    """Click a button of the Generate tab; the new pictures, once the page shows the last."""
    before = set(pictures(app))
    page.page.click(selector)
    wait_for(lambda: len(pictures(app)) == len(before) + count)
    new = [path for path in pictures(app) if path not in before]
    page.page.wait_for_selector(f"img[src*='{new[-1].name}']")
    # The button does nothing before the page has heard that its event has ended.
    page.page.wait_for_selector("#make:not([disabled])")
    page.page.wait_for_timeout(500)
    return new


def set_up_pictures(page: Visit) -> None:
    page.tab("Generate")
    page.page.locator("#seed input").fill("7")
    page.page.get_by_role("button", name="Steps, guidance").click()
    set_slider(page, "Steps", "2")
    set_slider(page, "Pictures", "1")


def test_pictures_repeat_compare_and_say_how_they_were_made(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    from dora_diffusion.pictures import parse_parameters, read_parameters

    page = visit()
    set_up_pictures(page)
    (first,), (again,) = press(page, app, "#make"), press(page, app, "#make")
    assert pixels(first) == pixels(again)
    found = parse_parameters(read_parameters(first) or "")
    assert (found["Seed"], found["Steps"], found["Prompt"]) == (
        "7", "2", "a photo of a sks mug on the snow",
    )  # fmt: skip
    pair = press(page, app, "#compare", 2)
    assert page.page.locator("#slider img").count() == 2
    base = next(path for path in pair if "Adapter" not in (read_parameters(path) or ""))
    set_slider(page, "Strength", "0")
    (zero,) = press(page, app, "#make")
    assert pixels(zero) == pixels(base) != pixels(first)
    page.page.get_by_role("button", name="Grid of checkpoints").click()
    page.page.locator("#grid-strengths input, #grid-strengths textarea").fill("0, 1")
    (grid,) = press(page, app, "#grid")
    with Image.open(grid) as image:
        assert image.width == 2 * 64 + 2  # two strengths
        assert image.height > 2 * 64  # two checkpoints, under labels
    page.page.get_by_role("button", name="Load settings from a PNG").click()
    page.page.locator("#seed input").fill("99")
    page.page.set_input_files("#load-png input[type=file]", first)
    page.page.wait_for_function("document.querySelector('#seed input').value === '7'")
    wrong = app.runs.parent / "plain.png"
    Image.new("RGB", (8, 8)).save(wrong)
    page.page.locator("#load-png [aria-label=Clear], #load-png [aria-label=Remove]").first.click()
    page.page.set_input_files("#load-png input[type=file]", wrong)
    assert "does not say how it was made" in page.toast()


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT / 1000
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_library_gives_files_merges_and_remembers(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    from dora_diffusion.formats.safetensors_stream import read_header

    page = visit()
    page.tab("Library")
    page.page.wait_for_selector("#library img")
    page.wait_text("#library-facts", "sks mug")
    page.page.click("#convert")
    page.page.wait_for_selector("#files a.dd-download")
    with page.page.expect_download() as download:
        page.page.locator("#files a.dd-download").first.click()
    assert download.value.suggested_filename == "sks-mug.safetensors"
    assert len(read_header(Path(download.value.path())).specs) > 10
    page.page.click("#merge")
    page.wait_text("#merges", "Download sks-mug-step-")
    (merged,) = app.runs.glob("exports/*/*merged.safetensors")
    assert any(name.startswith("model.diffusion_model.") for name in read_header(merged).specs)
    with page.page.expect_download() as download:
        page.page.locator("#merges a.dd-download").first.click()
    assert Path(download.value.path()).stat().st_size == merged.stat().st_size


def test_a_merged_model_can_be_loaded_and_makes_the_adapter_s_pictures(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    set_up_pictures(page)
    (adapted,) = press(page, app, "#make")
    page.page.locator("#adapter input").click()
    page.page.locator("#adapter [role=option]").filter(has_text="Merge").first.click()
    (merged,) = press(page, app, "#make")
    # The sum is rounded once more where it is stored.
    differences = [abs(a - b) for a, b in zip(pixels(adapted), pixels(merged), strict=True)]
    assert max(differences) <= 2


def test_publishing_says_what_is_missing(visit: Callable[..., Visit], second: str) -> None:
    page = visit()
    page.tab("Library")
    page.wait_text("#library-facts", "sks mug")
    page.page.get_by_role("button", name="Publish on the").click()
    page.page.locator("#repository input, #repository textarea").fill("ann/mug")
    page.page.click("#push")
    assert "HF_HUB_OFFLINE is set" in page.toast()


def test_a_restart_of_the_app_forgets_nothing(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    app.end(signal.SIGKILL)
    app.start()
    page = visit()
    page.tab("Train")
    page.wait_text("#jobs", "done")
    page.tab("Train")
    page.page.wait_for_selector("#checkpoints .dd-choice")
    page.tab("Library")
    page.page.wait_for_selector("#library img")


def test_a_phone_has_all_four_tabs_and_needs_no_sideways_scrolling(
    visit: Callable[..., Visit], second: str
) -> None:
    page = visit(390)
    for name, shown in (
        ("Subject", "#upload"), ("Train", "#status"), ("Generate", "#make"),
        ("Library", "#library-facts"),
    ):  # fmt: skip
        page.tab(name)
        page.page.wait_for_selector(f"{shown}:visible")
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_delete_asks_and_removes_everything(
    visit: Callable[..., Visit], app: App, second: str
) -> None:
    page = visit()
    page.tab("Library")
    page.page.wait_for_selector("#library img")
    page.page.get_by_role("button", name="Delete", exact=False).first.click()
    page.page.locator("#delete").click()
    wait_for(lambda: not (app.runs / second).exists())
    wait_for(lambda: not (app.runs / "exports" / second).exists())
