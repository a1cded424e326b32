"""The app as a process of its own, and tabs of headless Chromium that wait for what happens.

Nothing here waits by the clock. A wait ends when what it waits for is there. It fails when a run
that it depends on has failed, when the app has ended, or when no job has moved for `WAIT_SECONDS`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

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
# Events of which the server has not yet told that they have ended, but for the clock's.
UNANSWERED = """{
    const {fetch} = window, open = window.unanswered = new Set(), ended = new Set()
    const isClock = ({fn_index: index}) => gradio_config.dependencies.some(({id, targets}) =>
        id === index && targets.some(([, event]) => event === 'tick'))
    // What the page is told, before it is told.
    const noting = () => {
        const decoder = new TextDecoder()
        let rest = ''
        return new TransformStream({transform(part, page) {
            const lines = (rest + decoder.decode(part, {stream: true})).split('\\n')
            rest = lines.pop()
            for (const line of lines.filter((line) => line.includes('process_completed'))) {
                const {msg, event_id: id} = JSON.parse(line.slice(line.indexOf('{')))
                if (msg === 'process_completed' && !open.delete(id)) ended.add(id)
            }
            page.enqueue(part)
        }})
    }
    const join = async (request) => {
        open.add(request)
        try {
            const response = await fetch(...request)
            const {event_id: id} = response.ok ? await response.clone().json() : {}
            if (id && !ended.has(id)) open.add(id)
            return response
        } finally {
            open.delete(request)
        }
    }
    window.fetch = async (...request) => {
        const address = String(request[0].url ?? request[0])
        if (address.includes('/queue/join') && !isClock(JSON.parse(request[1].body)))
            return join(request)
        const response = await fetch(...request)
        if (!address.includes('/queue/data')) return response
        return new Response(response.body.pipeThrough(noting()), response)
    }
}"""
# The page has what it has asked for: five frames, however long they take.
ANSWERED = """() => new Promise(done => {
    let quiet = 0
    const frame = () => {
        quiet = unanswered.size ? 0 : quiet + 1
        return quiet > 5 ? done(true) : requestAnimationFrame(frame)
    }
    frame()
})"""
# And it has nothing more to draw: twenty frames with no change.
SETTLED = """() => new Promise(done => {
    let quiet = 0
    const watch = new MutationObserver(() => { quiet = 0 })
    watch.observe(document, {
        subtree: true, childList: true, attributes: true, characterData: true,
    })
    const frame = () => {
        quiet = unanswered.size ? 0 : quiet + 1
        if (quiet <= 20) return requestAnimationFrame(frame)
        watch.disconnect()
        done(true)
    }
    frame()
})"""
# What was just unfolded gets its values a frame after it is drawn, whatever was typed meanwhile.
DRAWN = """() => new Promise(done => {
    let frames = 0
    const frame = () => ++frames > 3 ? done(true) : requestAnimationFrame(frame)
    frame()
})"""
# A message closes itself: those that came are kept, for whoever looks late.
MESSAGES = """window.messages = []
new MutationObserver((changes) => {
    const added = changes.flatMap((change) => [...change.addedNodes])
    const parts = added.filter((node) => node.nodeType === Node.ELEMENT_NODE)
    window.messages.push(...parts.flatMap((part) =>
        part.matches('.toast-body') ? [part] : [...part.querySelectorAll('.toast-body')]))
}).observe(document, {subtree: true, childList: true})"""
TAKE_MESSAGE = """() => {
    const message = window.messages.shift()
    message.querySelector('.toast-close').click()
    return message.textContent
}"""
BAD_STATES = ("failed", "crashed")

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


class App:
    """The server as a process of its own, as ``python app.py`` starts it.

    It keeps its port when it is started again, as a page in the browser keeps what was typed by
    address; and no test beside it takes the port meanwhile.
    """

    _ports = itertools.count(20000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))

    def __init__(self, runs: Path, **environment: str) -> None:
        self.runs = runs
        self.port = next(self._ports)
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

    def end(self) -> None:
        """As its user does; on Windows the same as `kill`."""
        if self._process is not None:
            self._process.terminate()
            self._ended()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended()

    def _ended(self) -> None:
        assert self._process is not None
        self._process.communicate()
        self._process = None

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
        with urllib.request.urlopen(f"{self.url}gradio_api/startup-events") as answer:
            answer.read()
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
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(WAIT_SECONDS * 1000)
        self.page.add_init_script(MESSAGES)
        self.page.add_init_script(UNANSWERED)
        self.wrong: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.open()

    def open(self) -> None:
        """Open the page, or open it again."""
        self.page.goto(self.app.url, wait_until="commit")
        self._wait_for_load()

    def _wait_for_load(self) -> None:
        self.wait_for("#upload")
        # The page's load event fills the fields, and others come after it, beside each other.
        self.wait("!document.querySelector('.dd-connecting')")
        self.wait(ANSWERED)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(message.text)

    def _request(self, request: Any) -> None:
        outside = request.url.startswith("http") and "//127.0.0.1:" not in request.url
        if outside:
            self.wrong.append(f"left the machine: {request.url}")

    def wait(self, script: str, arg: Any = None) -> None:
        """Wait until a script holds in the page: an expression, or a function of ``arg``."""

        def look(limit: float) -> None:
            self.page.wait_for_function(script, arg=arg, timeout=limit)

        try:
            self.act(look)
        except AssertionError as error:
            shown = self.page.evaluate("document.body.innerText")
            raise AssertionError(f"{error}\nwaited for {script} {arg}\n{shown[-3000:]}") from error

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

        self.app.until(look)

    def settle(self) -> None:
        """Wait until the page has what it has asked for, and has drawn it."""
        self.wait(SETTLED)

    def drawn(self) -> None:
        """Wait until what was just unfolded has its values."""
        self.page.evaluate(DRAWN)

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
        self.drawn()
        self.act(lambda limit: field.fill(value, timeout=limit))

    def check(self, label: str) -> None:
        box = self.page.get_by_label(label).first  # "Fast", not "Fast word"
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
        return str(self.page.evaluate(TAKE_MESSAGE))

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
        self._wait_for_load()

    def close(self) -> None:
        assert self.wrong == []
        self.page.close()


@pytest.fixture
def app_class() -> type[App]:
    """For the tests of the waiting itself."""
    return App


@pytest.fixture(scope="module")
def app_environment() -> dict[str, str]:
    """Variables that a module adds to the environment of its app."""
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a module's app."""
    return tmp_path_factory.mktemp("app") / "runs"


@pytest.fixture(scope="module")
def app(runs: Path, app_environment: dict[str, str]) -> Iterator[App]:
    one = App(runs, **app_environment)
    one.start()
    yield one
    one.end()
    from dora_diffusion.studio.jobs.queue import end_tree

    for worker in one.workers():
        end_tree(worker)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(
            executable_path=CHROMIUM, args=list(FLAGS), timeout=WAIT_SECONDS * 1000
        )
        yield one
        one.close()


@pytest.fixture(scope="module")
def open_tab(browser: Any, app: App) -> Callable[..., Visit]:
    """Opens a tab that its user closes."""
    return lambda width=1280: Visit(browser, app, width)


@pytest.fixture
def visit(open_tab: Callable[..., Visit]) -> Iterator[Callable[..., Visit]]:
    opened: list[Visit] = []

    def open_page(width: int = 1280) -> Visit:
        opened.append(open_tab(width))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()
