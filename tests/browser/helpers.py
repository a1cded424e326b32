"""Runs and images that are there before a page is opened, and what tests of several tabs do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.store import Workspace, write_json
from tests.studio.jobs.helpers import METRICS, make

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"
ADAPTER = ROOT / "tests/formats/golden/0.1.0/diffusers-dora-ranks.safetensors"
# The tab and the server of conftest.py.
Visit = App = Any


def finished_run(
    workspace: Workspace, title: str, *, adapter: Path = ADAPTER, steps: int = 3,
    checkpoints: tuple[int, ...] = (), **settings: Any,
) -> Path:  # fmt: skip
    """The folder of a run that has ended, with an adapter at its end and at each checkpoint."""
    settings = {"token": "sks", "class_word": "mug", "max_train_steps": steps, **settings}
    folder = make(workspace, title, **settings)
    (folder / "metrics.jsonl").write_text(METRICS.format(step=steps), encoding="utf-8")
    for place in (folder, *(folder / f"checkpoint-{step}" for step in checkpoints)):
        place.mkdir(exist_ok=True)
        shutil.copyfile(adapter, place / "pytorch_lora_weights.safetensors")
        if place != folder:
            (place / "training_state.pt").write_bytes(b"")
    write_json(folder / records.RESULT, {"code": 0})
    return folder


def images_of(app: App) -> list[Path]:
    return sorted((app.runs / "images").glob("*.png"))


def set_slider(page: Visit, name: str, value: str) -> None:
    field = page.page.get_by_label(f"number input for {name}")
    page.fill_in(field, value)
    field.press("Tab")


def set_up_images(page: Visit) -> None:
    page.tab("Generate")
    page.fill("#seed input", "7")
    page.press("button", "Steps, guidance")
    page.fill("#steps input, #steps textarea", "2")
    set_slider(page, "Images", "1")
    page.settle()


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


def serious(page: Visit) -> list[str]:
    """Serious violations that axe-core finds on the page, in both schemes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = []
    for scheme in ("dark", "light"):
        page.page.emulate_media(color_scheme=scheme)
        page.drawn()
        for one in axe.run(page.page).response["violations"]:
            if one["impact"] in ("serious", "critical"):
                found += [f"{scheme}: {one['id']}: {node['html']}" for node in one["nodes"]]
    return found
