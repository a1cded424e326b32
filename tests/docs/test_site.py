"""The site as a browser shows it: built strictly, searched, and looked at in three ways."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, FLAGS
from tests.waiting import WAIT_SECONDS
from tools.pages import DOCS, ROOT

for needed in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(needed)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium"),
]

PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
# What newcomers ask, and the page that answers.
QUESTIONS = {
    "comfyui file": "start/comfyui",
    "out of memory": "howto/out-of-memory",
    "looks burnt": "howto/troubleshooting",
    "two subjects": "howto/several-subjects",
    "prior preservation or not": "howto/prior-preservation",
    "resume": "howto/resume",
    "my kohya dataset": "howto/from-kohya",
    "strength of an adapter": "howto/strength",
    "v-prediction": "howto/v-prediction",
    "use in diffusers": "howto/diffusers",
    "face looks plastic": "howto/troubleshooting",
    "trigger word": "howto/captions",
    "comfyui lora not working": "start/comfyui",
    "how many photos": "howto/prepare",
    "windows": "start/install",
    "cuda": "start/install",
    "learning rate": "howto/learning-rate",
    "captions": "howto/captions",
    "every dog looks like my dog": "howto/troubleshooting",
    "8 gb vram": "howto/out-of-memory",
    "merge lora into checkpoint": "howto/export",
    "continue training an old lora": "howto/start-from-adapter",
    "password for the app": "howto/share-app",
    "upload to hugging face": "howto/export",
    "train on two gpus": "howto/several-gpus",
    "how many steps": "howto/choose-checkpoint",
    "docker": "start/container",
    # Chosen when the pages had been written.
    "blurry results": "howto/troubleshooting",
    "lora does nothing in forge": "howto/export",
    "how to write captions": "howto/captions",
    "heic photos": "howto/prepare",
    "stop and continue later": "howto/resume",
    "convert kohya lora to diffusers": "howto/from-kohya",
    "train the text encoder": "howto/layers",
    "is dora better than lora": "understand/findings",
    "prompt is ignored": "howto/troubleshooting",
    "masked training": "howto/masks",
    "regularization images": "howto/prior-preservation",
    "negative prompt": "howto/samples",
    "apple m2": "start/install",
    "bf16 or fp16": "howto/speed",
    "train 1000 subjects": "howto/fleets",
    "lettering is mirrored": "howto/troubleshooting",
    "invokeai": "howto/export",
    "noobai vpred": "howto/v-prediction",
    "python api": "howto/own-loop",
    "make the file smaller": "howto/extract",
}
PARTS = ["Start", "How to", "Understand", "Reference", "Contribute"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, without one warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", DOCS, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(
            executable_path=CHROMIUM, args=list(FLAGS), timeout=WAIT_SECONDS * 1000
        )
        yield browser
        browser.close()


def test_the_search_answers_newcomers_first(browser: Any, address: str) -> None:
    """The first hit of the site's own search is the page that answers."""
    page, first = browser.new_page(), {}
    page.set_default_timeout(WAIT_SECONDS * 1000)
    for question in QUESTIONS:
        page.goto(f"{address}/search.html?q={question.replace(' ', '+')}")
        page.wait_for_selector("#search-results ul.search li a")
        link = page.locator("#search-results ul.search li a").first.get_attribute("href")
        first[question] = link.partition(".html")[0]
    assert first == QUESTIONS


def test_the_sidebar_is_five_parts_that_fold(browser: Any, address: str) -> None:
    page = browser.new_page(viewport=LAPTOP)
    page.goto(f"{address}/index.html")
    parts = page.locator(".sidebar-tree > ul > li")
    assert [part.locator("> a").inner_text().strip() for part in parts.all()] == PARTS
    for part in parts.all():
        inside = part.locator("> ul")
        assert not inside.is_visible()
        part.locator("> label").click()
        assert inside.is_visible()


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_pages_can_be_read_by_everybody(look: str, browser: Any, address: str, built: Path) -> None:
    """Nothing that axe-core calls serious, wider than the screen, or from elsewhere."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    scheme = "dark" if look == "dark" else "light"
    viewport = PHONE if look == "phone" else LAPTOP
    context = browser.new_context(color_scheme=scheme, viewport=viewport)
    context.set_default_timeout(WAIT_SECONDS * 1000)
    page, asked, problems = context.new_page(), [], {}
    page.on("request", lambda request: asked.append(request.url))
    pages = [path.relative_to(built) for path in sorted(built.rglob("*.html"))]
    for path in pages:
        page.goto(f"{address}/{path.as_posix()}")
        found = axe.run(page).response["violations"]
        serious = [
            f"{violation['id']}: {node['html'][:120]}"
            for violation in found
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > viewport["width"]:
            serious.append(f"is {width} pixels wide")
        if serious:
            problems[path.as_posix()] = serious
    assert problems == {}, json.dumps(problems, indent=1)[:9000]
    assert len(pages) > 40
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
