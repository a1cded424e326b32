"""The site as a browser shows it: built strictly, searched, and looked at in three ways."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, FLAGS
from tests.waiting import WAIT_SECONDS
from tools import search
from tools.pages import DOCS, ROOT
from tools.search import Question

for needed in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(needed)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium"),
]

PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
# What newcomers type, and the page that answers.
SHORT = {
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
    "negative prompt": "howto/negative-prompt",
    "apple m2": "start/install",
    "bf16 or fp16": "howto/speed",
    "train 1000 subjects": "howto/fleets",
    "lettering is mirrored": "howto/troubleshooting",
    "invokeai": "howto/export",
    "noobai vpred": "howto/v-prediction",
    "python api": "howto/own-loop",
    "make the file smaller": "howto/extract",
    "two dogs": "howto/several-subjects",
    "change trigger word later": "howto/captions",
    "learning rate halfway": "howto/resume",
    "train text encoder or not": "howto/layers",
    "windows defender": "start/install",
    "hands are bad": "howto/troubleshooting",
    "merge two loras": "howto/extract",
    "difference between lora and dora": "understand/dora",
    "safetensors to diffusers": "howto/diffusers",
    "png with transparency": "howto/masks",
    "which gpu": "howto/out-of-memory",
    "everyone looks like my face": "howto/troubleshooting",
    "pony": "howto/pony-illustrious",
    "illustrious lora": "howto/pony-illustrious",
    "flux 2 klein": "howto/flux2-klein",
    "klein lora comfyui": "howto/flux2-klein",
    "rtx3090 sdxl": "howto/out-of-memory",
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


@pytest.fixture(scope="module")
def found(browser: Any, built: Path) -> Iterator[Callable[[Sequence[str]], list[list[str]]]]:
    """Paths of the results of several queries, by the page opened from its file."""
    page = browser.new_page()
    page.goto((built / "search.html").as_uri())
    ask = "queries => queries.map(query => siteSearch(query).map(({ path }) => path))"
    yield lambda queries: page.evaluate(ask, list(queries))
    page.close()


def ranks(found: Any, queries: Iterable[str], asked: Sequence[Question]) -> list[int]:
    """Return the rank of each query; 99 where no result answers."""
    paths = found(queries)
    return [search.rank(got, q.answers) or 99 for got, q in zip(paths, asked, strict=True)]


def test_the_search_answers_newcomers_first(found: Any) -> None:
    first = {q: got[0].partition(".html")[0] for q, got in zip(SHORT, found(SHORT), strict=True)}
    assert first == SHORT


def test_the_search_answers_what_people_asked_elsewhere(found: Any) -> None:
    """Nine of ten by the first result, all but three of a hundred by the first three."""
    asked = [question for question in search.questions() if not question.held_out]
    got = ranks(found, [question.title for question in asked], asked)
    assert len(got) > 90
    missed = [(q.title, rank) for q, rank in zip(asked, got, strict=True) if rank > 1]
    assert sum(rank == 1 for rank in got) >= 0.9 * len(got), missed
    assert sum(rank <= 3 for rank in got) >= 0.97 * len(got), missed


def swapped(word: str) -> str:
    half = len(word) // 2
    return word[: half - 1] + word[half] + word[half - 1] + word[half + 1 :]


def dropped(word: str) -> str:
    return word[: len(word) // 2] + word[len(word) // 2 + 1 :]


def test_results_show_what_they_found(browser: Any, built: Path) -> None:
    """Page and section, and an excerpt with the words marked, without a server."""
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{(built / 'search.html').as_uri()}?q=clip+skip+anime")
    first = page.locator("#search-results > li").first
    link = first.locator("a").first
    assert link.get_attribute("href") == "howto/captions.html#clip-skip"
    assert link.inner_text() == "Captions, tags and trigger words \u203a Clip skip"
    marked = {text.lower() for text in first.locator("p mark").all_inner_texts()}
    assert {"clip", "skip"} <= marked
    excerpts = page.locator("#search-results > li p").all_inner_texts()
    assert len(excerpts) == 10
    assert all(20 < len(text) < 260 for text in excerpts)
    page.locator("#search-form input").fill("qqqq")
    assert page.locator("#search-status").inner_text() == "Nothing found."
    assert [url for url in asked if not url.startswith("file:")] == []


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
