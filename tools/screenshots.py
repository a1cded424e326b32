"""The app's images in ``docs/images/app-*.jpg``, taken from the app as it is.

    python -m tools.screenshots                      # some minutes of training on two cores
    python -m tools.screenshots --steps 8 --output /tmp/shots   # the layout alone

Starts the app on an empty folder, trains the embedded model on a sample subject as a person would,
and takes each image when the page shows what it is of. Needs Playwright (extra ``[test]``) and
Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH, PHONE, PHONE_HEIGHT, GAP = 1280, 390, 945, 20
QUALITY = 82
# Of the image in JPEG. What is below is cut off, so that all of them are about one screen high.
HEIGHTS = {"subject": 945, "train": 955, "generate": 1178, "library": 942}


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

    def __init__(self, browser: Any, url: str, width: int, scheme: str = "light") -> None:
        size = {"width": width, "height": PHONE_HEIGHT}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.set_default_timeout(0)  # Training takes what it takes.
        self.page.goto(url)
        self.page.wait_for_selector("#upload")
        self.page.wait_for_function("!document.querySelector('.dd-connecting')")

    def open(self, name: str) -> None:
        """Go to a tab of the page."""
        self.page.get_by_role("tab", name=name).first.click()
        self.page.wait_for_timeout(1500)  # It is drawn when it is first seen.

    def wait_text(self, selector: str, pattern: str) -> None:
        """Wait until an element's text matches."""
        self.page.wait_for_function(
            "([s, p]) => new RegExp(p).test(document.querySelector(s)?.innerText ?? '')",
            arg=[selector, pattern],
        )

    def image(self, height: int = PHONE_HEIGHT, top: str = "") -> Image.Image:
        """What is to be seen, from the top of the page or of an element on."""
        width = self.page.viewport_size["width"]
        self.page.set_viewport_size({"width": width, "height": height})
        if top:
            self.page.eval_on_selector(top, "e => e.scrollIntoView({block: 'start'})")
        else:
            self.page.evaluate("window.scrollTo(0, 0)")
        self.page.wait_for_timeout(1500)
        return opened(self.page.screenshot())


def opened(content: bytes) -> Image.Image:
    """A screenshot as an image."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def train(tab: Tab, steps: int | None) -> None:
    """Train on the sample subject by the page's own settings."""
    tab.open("Train")
    tab.page.wait_for_function(
        "document.querySelector('#class-word input, #class-word textarea')?.value === 'mug'"
    )
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
    tab.page.wait_for_selector("#samples img")


def take(browser: Any, url: str, steps: int | None) -> dict[str, Image.Image]:
    """All images by the names of their files."""
    images = {}
    tab = Tab(browser, url, WIDTH)
    tab.page.click("[data-value=bolt_mug]")
    tab.wait_text("#report", "ready to train")
    tab.page.wait_for_selector("#crops img")
    images["subject"] = tab.image(HEIGHTS["subject"])
    train(tab, steps)
    images["train"] = tab.image(HEIGHTS["train"])
    tab.open("Generate")
    tab.page.fill("#seed input", "7")
    tab.page.click("#side-by-side")
    tab.wait_text("#parameters", "Seed: 7")
    tab.page.wait_for_selector("#make:not([disabled])")
    images["generate"] = tab.image(HEIGHTS["generate"])
    tab.open("Library")
    tab.page.click("#convert")
    tab.page.wait_for_selector("#tasks a.dd-download")
    images["library"] = tab.image(HEIGHTS["library"])
    tab.page.close()
    images["checkpoints"] = checkpoints(browser, url)
    images["phone"] = beside(phone(browser, url))
    return images


def checkpoints(browser: Any, url: str) -> Image.Image:
    """The comparison of a run's checkpoints, in dark mode."""
    tab = Tab(browser, url, WIDTH, "dark")
    tab.open("Train")
    tab.page.click("#rank-checkpoints")
    tab.page.wait_for_selector("#checkpoints .dd-choice")
    for shown in tab.page.locator("#checkpoints img").all():
        shown.scroll_into_view_if_needed()
    tab.page.wait_for_timeout(1500)
    image = opened(tab.page.locator("#chooser").screenshot())
    tab.page.close()
    return image


def phone(browser: Any, url: str) -> list[Image.Image]:
    """Four screens of a phone."""
    tab = Tab(browser, url, PHONE)
    screens = [tab.image(top="#crops")]
    tab.open("Train")
    screens += [tab.image(), tab.image(top="#status")]
    tab.open("Library")
    screens.append(tab.image())
    tab.page.close()
    return screens


def beside(screens: list[Image.Image]) -> Image.Image:
    """Screens in a row, on white."""
    width = len(screens) * (PHONE + GAP) - GAP
    image = Image.new("RGB", (width, PHONE_HEIGHT), "white")
    for place, screen in enumerate(screens):
        image.paste(screen, (place * (PHONE + GAP), 0))
    return image


def main() -> None:
    """Take all images."""
    parser = argparse.ArgumentParser(description="Take the images of docs/howto/app.md anew.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images", help="Where app-*.jpg go."
    )
    parser.add_argument("--steps", type=int, help="Training steps. Default: the page's own.")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    args.output.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    with (
        tempfile.TemporaryDirectory() as folder,
        app(Path(folder) / "runs") as url,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        for name, image in take(browser, url, args.steps).items():
            file = args.output / f"app-{name}.jpg"
            image.save(file, quality=QUALITY, optimize=True)
            print(f"{file}: {image.width} x {image.height}, {file.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
