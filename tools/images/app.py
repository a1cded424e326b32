"""The app's images, ``app-NAME.jpg`` and ``app-NAME-dark.jpg``, taken from the app as it is.

Starts the app on an empty folder, trains the embedded model on a sample subject as a person would,
and takes each image when the page shows what it is of. Needs Playwright (extra ``[test]``) and
Chromium. Ends with what it waited for where the app shows an error or the time is over.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WIDTH, PHONE, PHONE_HEIGHT, GAP = 1280, 390, 945, 20
QUALITY = 82
# Of the image in JPEG. What is below is cut off, so that all of them are about one screen high.
HEIGHTS = {"subject": 945, "train": 955, "generate": 1178, "library": 942}
SCHEMES = {"light": "", "dark": "-dark"}
# Of all waiting together; a training by the page's own settings takes some minutes.
LIMIT_SECONDS, LOOK_MILLISECONDS = 1800, 1000
Images = dict[str, Image.Image]


@contextlib.contextmanager
def app(runs: Path) -> Iterator[str]:
    """The app as a process of its own; gives its address."""
    command = [sys.executable, str(ROOT / "app.py"), "--runs_dir", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("open http"):
                raise SystemExit("the app did not start; what it said stands above")
            yield line.split()[1]
        finally:
            process.terminate()


class Tab:
    """A tab of the browser on the app."""

    def __init__(self, browser: Any, url: str, width: int, until: float) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": PHONE_HEIGHT})
        self.until = until
        self.page.goto(url)
        self.wait("document.querySelector('#upload')")
        self.wait("!document.querySelector('.dd-connecting')")

    def open(self, name: str) -> None:
        """Open a tab of the page."""
        self.page.get_by_role("tab", name=name).first.click()
        self.page.wait_for_timeout(1500)  # It is drawn when it is first seen.

    def wait(self, script: str, arg: Any = None) -> None:
        """Wait until a script holds in the page.

        Raises:
            SystemExit: If the page shows an error, or the time is over.
        """
        from playwright.sync_api import TimeoutError

        while True:
            try:
                self.page.wait_for_function(script, arg=arg, timeout=LOOK_MILLISECONDS)
                return
            except TimeoutError:
                errors = self.page.locator(".toast-body.error").all_inner_texts()
                late = ["the time is over"] if time.monotonic() > self.until else []
                for reason in errors + late:
                    raise SystemExit(f"{reason!r}; waited for {script} {arg or ''}") from None

    def wait_text(self, selector: str, pattern: str) -> None:
        """Wait until an element's text matches."""
        self.wait(
            "([s, p]) => new RegExp(p).test(document.querySelector(s)?.innerText ?? '')",
            [selector, pattern],
        )

    def images(self, name: str, height: int = PHONE_HEIGHT, top: str = "") -> Images:
        """Return images in either scheme, from the top of the page or of an element on."""
        width = self.page.viewport_size["width"]
        self.page.set_viewport_size({"width": width, "height": height})
        if top:
            # With the heading above it.
            self.page.eval_on_selector(top, "e => { e.scrollIntoView(); scrollBy(0, -24) }")
        else:
            self.page.evaluate("window.scrollTo(0, 0)")
        return self.in_both(name, self.page)

    def in_both(self, name: str, shown: Any) -> Images:
        """The page, or an element of it, in the light and in the dark scheme."""
        images = {}
        for scheme, mark in SCHEMES.items():
            self.page.emulate_media(color_scheme=scheme)
            self.page.wait_for_timeout(1500)
            images[name + mark] = opened(shown.screenshot())
        self.page.emulate_media(color_scheme="light")
        return images


def opened(content: bytes) -> Image.Image:
    """A screenshot as an image."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def train(tab: Tab, steps: int | None) -> None:
    """Train on the sample subject by the page's own settings."""
    tab.open("Train")
    tab.wait("document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'")
    tab.wait_text("#plan", "--max_train_steps")
    if steps is not None:
        for title in ("Advanced settings", "Optimization", "Output"):
            tab.page.get_by_role("button", name=title).first.click()
        for name, value in (("max_train_steps", steps), ("checkpointing_steps", steps // 2)):
            field = tab.page.get_by_label(name, exact=False).first
            field.fill(str(value))
            field.press("Tab")
            tab.wait_text("#plan", f"--{name} {value}")
        tab.page.get_by_role("button", name="Advanced settings").first.click()
    tab.page.click("#start")
    tab.wait_text("#status", "Write .sks mug. in a prompt")
    tab.wait("document.querySelector('#samples img')")


def take(browser: Any, url: str, steps: int | None) -> Images:
    """All images by the names of their files."""
    until = time.monotonic() + LIMIT_SECONDS
    tab = Tab(browser, url, WIDTH, until)
    tab.page.click("[data-value=bolt_mug]")
    tab.wait_text("#report", "ready to train")
    tab.wait("document.querySelector('#crops img')")
    images = tab.images("subject", HEIGHTS["subject"])
    train(tab, steps)
    images |= tab.images("train", HEIGHTS["train"])
    tab.open("Generate")
    tab.wait("document.querySelector('#adapter input')?.value.includes('step')")
    tab.page.fill("#seed input", "7")
    tab.page.click("#side-by-side")
    tab.wait_text("#parameters", "Seed: 7")
    tab.wait("document.querySelector('#make:not([disabled])')")
    images |= tab.images("generate", HEIGHTS["generate"])
    tab.open("Library")
    tab.page.click("#convert")
    tab.wait("document.querySelector('#tasks a.dd-download')")
    images |= tab.images("library", HEIGHTS["library"])
    tab.page.close()
    images |= checkpoints(browser, url, until)
    return images | phone(browser, url, until)


def checkpoints(browser: Any, url: str, until: float) -> Images:
    """The comparison of a run's checkpoints."""
    tab = Tab(browser, url, WIDTH, until)
    tab.open("Train")
    tab.page.click("#rank-checkpoints")
    tab.wait("document.querySelector('#checkpoints .dd-choice')")
    for shown in tab.page.locator("#checkpoints img").all():
        shown.scroll_into_view_if_needed()
    images = tab.in_both("checkpoints", tab.page.locator("#chooser"))
    tab.page.close()
    return images


def phone(browser: Any, url: str, until: float) -> Images:
    """Four screens of a phone in a row."""
    tab = Tab(browser, url, PHONE, until)
    tab.wait("document.querySelector('#crops img')")
    screens = [tab.images("phone", top="#crops")]
    tab.open("Train")
    screens += [tab.images("phone"), tab.images("phone", top="#status")]
    tab.open("Library")
    screens.append(tab.images("phone"))
    tab.page.close()
    return {name: in_a_row([screen[name] for screen in screens]) for name in screens[0]}


def in_a_row(screens: list[Image.Image]) -> Image.Image:
    """Screens side by side, on white."""
    width = len(screens) * (PHONE + GAP) - GAP
    image = Image.new("RGB", (width, PHONE_HEIGHT), "white")
    for index, screen in enumerate(screens):
        image.paste(screen, (index * (PHONE + GAP), 0))
    return image


def draw(name: str, output: Path, work: Path, steps: int | None = None) -> list[Path]:
    """Capture all images of the app; returns their files.

    Args:
        name: "app".
        output: Folder of the images.
        work: Not used: the app trains in a folder of its own.
        steps: Training steps; None is the page's own number.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    files = []
    with (
        tempfile.TemporaryDirectory() as folder,
        app(Path(folder) / "runs") as url,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        for part, image in take(browser, url, steps).items():
            files.append(output / f"{name}-{part}.jpg")
            image.save(files[-1], quality=QUALITY, optimize=True)
        browser.close()
    return files
