"""One app and one headless Chromium for all tests; each has a folder and a context of its own.

The app is a process. While a test runs, the folder of runs is that test's alone (`fill`), and no
job begins unless the test asks for it (`leading`).

Nothing here waits by the clock. A wait ends when what it waits for is there. It fails when a run
that it depends on has failed, when the app has ended, or when no job has moved for `WAIT_SECONDS`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from dora_diffusion.studio.jobs.queue import Lock, end_tree
from dora_diffusion.studio.jobs.store import Workspace
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
# Nothing that Chromium does by itself may look for a network.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# How long the page is asked in one go, at first: each time that was too short, it is asked longer.
LOOK_MILLISECONDS = 1000
# The page's own sign (page.js): it has what it has asked for, and has drawn it.
IDLE = "document.body?.hasAttribute('data-idle')"
TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
# A message closes itself: those that came are kept, for whoever looks late.
MESSAGES = """window.messages = []
new MutationObserver((changes) => {
    const added = changes.flatMap((change) => [...change.addedNodes])
    const parts = added.filter((node) => node.nodeType === Node.ELEMENT_NODE)
    window.messages.push(...parts.flatMap((part) =>
        part.matches('.toast-body') ? [part] : [...part.querySelectorAll('.toast-body')]))
}).observe(document, {subtree: true, childList: true})"""
TAKE_MESSAGE = """() => {
    const message = window.taken = window.messages.shift()
    message.querySelector('.toast-close').click()
    return message.textContent
}"""
BAD_STATES = ("failed", "crashed")
SD1, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
HUB = {SD1: "sd1", SDXL: "sdxl"}

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Chromium or the embedded model there is nothing to see."""
    embedded = ROOT / "dora_diffusion" / "models" / "embedded" / "tiny-sd" / "model_index.json"
    reasons = {"there is no Chromium": Path(CHROMIUM).exists(),
               "the embedded model is not there": embedded.is_file()}  # fmt: skip
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for reason, is_there in reasons.items():
                item.add_marker(pytest.mark.skipif(not is_there, reason=reason))


def add_to_cache(cache: Path, name: str, family: str) -> None:
    """The configuration of a released model where the hub's library keeps it, without weights."""
    snapshot = cache / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
    (snapshot / "unet").mkdir(parents=True)
    kinds = {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    }  # fmt: skip
    unet: dict[str, Any] = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]}
    if family == "sdxl":
        kinds["text_encoder_2"] = "CLIPTextModelWithProjection"
        unet = {"sample_size": 128, "block_out_channels": [320, 640, 1280]}
        unet["addition_embed_type"] = "text_time"
    index = {part: ["diffusers", kind] for part, kind in kinds.items()}
    (snapshot / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (snapshot / "unet" / "config.json").write_text(json.dumps(unet), encoding="utf-8")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")


class App:
    """The server as a process of its own, as ``python app.py`` starts it.

    It keeps its port when it is started again, as a page in the browser keeps what was typed by
    address.
    """

    def __init__(self, runs: Path, **environment: str) -> None:
        self.runs = runs
        self.port = 0  # until the system has given it one
        self.url = ""
        self.environment = environment
        # Runs that a test ends by force; all others must end well.
        self.may_fail: set[str] = set()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "app.py", "--runs_dir", str(self.runs), "--port", str(self.port)],
            cwd=ROOT,
            env=environment | self.environment,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        self.url = line.split()[1]
        self.port = urlsplit(self.url).port or 0

    def ask(self, address: str) -> None:
        with urllib.request.urlopen(f"{self.url}{address}") as answer:
            answer.read()

    def read_jobs(self) -> None:
        """Have the server read all jobs anew, whatever it has read a moment before."""
        with suppress(AppError):  # There is no such job.
            Client(self.url, verbose=False).predict("none", api_name="/wait")

    def renew(self, fill: Callable[[Workspace], None]) -> None:
        """Have a living server with a folder of runs that holds what is filled in, and no more."""
        self.end_workers()
        self.may_fail.clear()
        workspace = Workspace(self.runs).make()
        # The server has the locks open, and serves its cache.
        kept = {workspace.cache, workspace.device_lock, workspace.queue_lock}

        def is_empty() -> bool:
            # A page that was closed may have left something in the making.
            for path in {*self.runs.iterdir()} - kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            return {*self.runs.iterdir()} <= kept

        wait_until(is_empty)
        fill(workspace.make())
        if self._process is not None and self._process.poll() is not None:
            self._ended()
        if self._process is None:
            self.start()
        self.read_jobs()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended()

    def _ended(self) -> None:
        assert self._process is not None
        self._process.communicate()
        self._process = None

    def end_workers(self) -> None:
        for worker in self.workers():
            end_tree(worker)

    def workers(self) -> list[psutil.Process]:
        """Living workers."""
        from dora_diffusion.studio.jobs.queue import worker_of

        return list(filter(None, map(worker_of, self.runs.glob("2*"))))

    def jobs(self) -> tuple[Any, ...]:
        """All jobs, newest first."""
        from dora_diffusion.studio.jobs.snapshot import snapshot

        return snapshot(self.runs) if self.runs.is_dir() else ()

    def until(self, look: Callable[[], Any]) -> Any:
        """Look until there is something to see, and return it."""
        return wait_until(look, self._check, self._moved)

    def _check(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, "the app has ended"
        self.ask("gradio_api/startup-events")
        for job in self.jobs():
            if job.id not in self.may_fail:
                assert job.state not in BAD_STATES, f"{job.title} has {job.state}: {job.cause}"

    def _moved(self) -> object:
        """State that changes while a job runs."""
        return [(job.id, job.state, job.step, job.progress.phase) for job in self.jobs()]


class Visit:
    """One tab of the browser, and what must stay empty while it is used."""

    def __init__(self, browser: Any, app: App, width: int = 1280) -> None:
        self.app = app
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, reduced_motion="reduce"
        )
        self.context.set_default_timeout(WAIT_SECONDS * 1000)
        self.context.add_init_script(MESSAGES)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._request)
        self.asked: list[str] = []  # questions of the page, and the answer to all of them
        self.answer = True
        self.page.on("dialog", self._dialog)
        self.open()

    def open(self) -> None:
        """Open the page, or open it again."""
        self.page.goto(self.app.url, wait_until="commit")
        self.settle()

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(message.text)

    def _dialog(self, dialog: Any) -> None:
        self.asked.append(dialog.message)
        dialog.accept() if self.answer else dialog.dismiss()

    def _request(self, request: Any) -> None:
        outside = request.url.startswith("http") and "//127.0.0.1:" not in request.url
        if outside:
            self.wrong.append(f"left the machine: {request.url}")

    def wait(self, script: str, arg: Any = None) -> None:
        """Wait until a script holds in the page: an expression, or a function of ``arg``."""
        self.act(lambda limit: self.page.wait_for_function(script, arg=arg, timeout=limit))

    def act(self, action: Callable[[float], Any]) -> None:
        """Do something as soon as the page lets it be done; it may be done twice."""
        limit = LOOK_MILLISECONDS / 2

        def look() -> bool:
            nonlocal limit
            # A limit that stays would be one on the machine's speed.
            limit = min(2 * limit, 60 * LOOK_MILLISECONDS)
            try:
                action(limit)
            except playwright.TimeoutError:
                return False
            return True

        try:
            self.app.until(look)
        except AssertionError as error:
            shown = self.page.evaluate("document.body.innerText")
            raise AssertionError(f"{error}\n{shown[-3000:]}") from error

    def settle(self) -> None:
        """Wait until the page has what it has asked for, and has drawn it."""
        self.wait(IDLE)

    def drawn(self) -> None:
        """Wait until the page has its new size: nothing that is animated may still move."""
        self.page.evaluate(TWO_FRAMES)
        self.wait("!document.getAnimations().some(one => one.playState === 'running')")

    def wait_for(self, selector: str) -> None:
        """Wait until an element is to be seen."""
        self.act(lambda limit: self.page.locator(selector).first.wait_for(timeout=limit))

    def click(self, selector: str, nth: int = 0) -> None:
        self.click_on(self.page.locator(selector).nth(nth))

    def click_on(self, element: Any) -> None:
        """Click once, when that can be done: an attempt that ran out may have clicked already."""
        self.act(lambda limit: element.click(timeout=limit, trial=True))
        element.click()

    def fill(self, selector: str, value: str) -> None:
        self.fill_in(self.page.locator(selector).first, value)

    def fill_in(self, field: Any, value: str) -> None:
        self.act(lambda limit: field.wait_for(timeout=limit))
        self.settle()  # What was just unfolded gets its values some frames after it is drawn.
        self.act(lambda limit: field.fill(value, timeout=limit))

    def check(self, label: str) -> None:
        box = self.page.get_by_label(label).first  # "Fast", not "Fast, with a trained word"
        self.act(lambda limit: box.check(timeout=limit))

    def choose(self, selector: str, text: str = "", nth: int = 0) -> None:
        """Pick an option of a dropdown by its text, or by its place."""
        field = self.page.locator(f"{selector} input").first
        options = self.page.locator(f"{selector} [role=option]")
        option = options.filter(has_text=text).nth(nth) if text else options.nth(nth)

        def pick(limit: float) -> None:
            # The list is gone as soon as the field loses the focus.
            field.evaluate("field => field.blur()")
            field.click(timeout=limit)
            option.click(timeout=limit)
            # A list that is renewed under the mouse has another option in the same place.
            self.page.wait_for_function(
                "([s, text]) => document.querySelector(s).value.includes(text)",
                arg=[f"{selector} input", text],
                timeout=limit,
            )

        self.act(pick)

    def download(self, selector: str) -> Any:
        """Click a link and take what it gives."""
        self.wait_for(selector)
        with self.page.expect_download() as download:
            self.click(selector)
        return download.value

    def press(self, role: str, name: str) -> None:
        """Click the first element of a role and name."""
        self.click_on(self.page.get_by_role(role, name=name).first)

    def tab(self, name: str) -> None:
        self.press("tab", name)

    def opened(self) -> str:
        """The name of the tab that is open."""
        return self.text("[role=tab][aria-selected=true]")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def wait_text(self, selector: str, pattern: str) -> str:
        """Wait until an element's text matches."""
        self.wait(
            "([s, p]) => new RegExp(p).test(document.querySelector(s)?.innerText ?? '')",
            [selector, pattern],
        )
        return self.text(selector)

    def toast(self) -> str:
        """Wait for a message and close it, where it has not closed itself; its text."""
        self.wait("window.messages.length")
        text = str(self.page.evaluate(TAKE_MESSAGE))
        self.wait("!window.taken.isConnected")
        return text

    def set_text(self, label: str, value: str) -> None:
        field = self.page.get_by_label(label, exact=False).first
        self.fill_in(field, value)
        field.press("Tab")

    def set_setting(self, name: str, value: str, selector: str = "#plan", shown: str = "") -> None:
        """Type a setting, and wait for the page's answer to it."""
        self.set_text(name, value)
        self.wait(
            "([s, text]) => document.querySelector(s)?.innerText.includes(text)",
            [selector, shown or f"--{name} {value}"],
        )

    def unfold(self, *titles: str) -> None:
        """Open accordions, from the outside in."""
        for title in titles:
            self.press("button", title)

    def reload(self) -> None:
        """Load the page again, which cuts off what it was asking for."""
        self.page.reload(wait_until="commit")
        self.settle()

    def close(self) -> None:
        wrong = self.wrong
        self.context.close()
        assert wrong == []


@pytest.fixture
def app_class() -> type[App]:
    """For the tests of the waiting itself."""
    return App


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two released models in the cache of the hub's library."""
    cache = tmp_path_factory.mktemp("hub")
    for name, family in HUB.items():
        add_to_cache(cache, name, family)
    return {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub")}


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[tuple[App, Lock]]:
    """The app, which is started when it is first needed, and the lock that keeps it from jobs."""
    app = App(tmp_path_factory.mktemp("app") / "runs", **environment)
    lock = Lock(Workspace(app.runs).make().queue_lock)
    assert lock.take()
    yield app, lock
    app.end_workers()
    app.kill()
    lock.free()


@pytest.fixture
def fill() -> Callable[[Workspace], None]:
    """Fills the folder of runs before a test; here with nothing."""
    return lambda workspace: None


@pytest.fixture
def app(server: tuple[App, Lock], fill: Callable[[Workspace], None]) -> App:
    """The running app with the test's own folder; no job begins."""
    server[0].renew(fill)
    return server[0]


@pytest.fixture
def leading(app: App, server: tuple[App, Lock]) -> Iterator[None]:
    """Jobs begin, until the end of the test."""
    _, lock = server
    lock.free()
    yield
    app.end_workers()
    app.kill()  # It leads the queue until it ends.
    assert lock.take()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(
            executable_path=CHROMIUM, args=list(FLAGS), timeout=WAIT_SECONDS * 1000
        )
        yield one
        one.close()


@pytest.fixture
def visit(browser: Any, app: App) -> Iterator[Callable[..., Visit]]:
    """Opens tabs, each as another person's browser; the test's end closes them."""
    opened: list[Visit] = []

    def open_page(width: int = 1280) -> Visit:
        opened.append(Visit(browser, app, width))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()
