"""Images as a person keeps and changes them: several adapters, image to image, masks, the menu."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.sampling.images import parse_parameters, read_parameters, save_image
from dora_diffusion.studio.jobs.queue import Lock
from dora_diffusion.studio.jobs.store import Workspace
from tests.browser.helpers import (
    App,
    Visit,
    finished_run,
    images_of,
    press,
    serious,
    set_slider,
    set_up_images,
)


@pytest.fixture(scope="session")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, random_adapter: Callable[..., Any]
) -> list[Path]:
    """Two adapters of a tiny model."""
    files = []
    for seed in range(2):
        files.append(tmp_path_factory.mktemp("adapters") / "adapter.safetensors")
        layers = random_adapter(sd1_folder, seed=seed, every=9)
        write_adapter(files[-1], AdapterFile(layers, AdapterMetadata("sd1", trigger="sks mug")))
    return files


@pytest.fixture
def fill(adapters: list[Path], sd1_folder: Path) -> Callable[[Workspace], None]:
    """A run with each of the adapters, and no image."""

    def prepared(workspace: Workspace) -> None:
        model = {"pretrained_model_name_or_path": str(sd1_folder)}
        for adapter, title in zip(adapters, ("first", "second"), strict=True):
            finished_run(workspace, title, adapter=adapter, **model)

    return prepared


IN_VIEW = """selector => {
    const {top, bottom} = document.querySelector(selector).getBoundingClientRect()
    return top >= 0 && bottom <= innerHeight
}"""


# What is painted, before and after it is cleared.
CLEARED = """() => {
    const painted = () => document.querySelector('#start-image canvas').painted().split(';')[0]
    const before = painted()
    document.querySelector('#start-image [data-do=clear]').click()
    return [before, painted()]
}"""


def fields_of(path: Path) -> dict[str, str]:
    return parse_parameters(read_parameters(path) or "")


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def test_images_are_made_of_several_adapters_and_of_one_another(
    visit: Callable[..., Visit], app: App
) -> None:
    page = visit()
    page.tab("Generate")
    page.wait_text("#history", "No images yet[^]*Generate images")
    page.wait("document.querySelector('#adapter input')?.value.includes('second')")
    set_up_images(page)
    page.press("button", "More adapters")
    page.choose("#adapter_second", "first")
    set_slider(page, "Second strength", "-0.5")
    (first,) = press(page, app, "#make")
    second, other = sorted(folder.name for folder in app.runs.glob("2*"))
    assert fields_of(first)["Adapter"] == f"{other}, {second}"
    assert fields_of(first)["Adapter strength"] == "1, -0.5"
    said = [fields_of(first)[name] for name in ("Seed", "Steps", "Prompt")]
    assert said == ["7", "2", "a photo of a sks mug in the snow"]
    # Into its left half, without a mouse.
    page.click("#image-start")
    page.wait_for("#start-image .dd-on")
    page.wait(IN_VIEW, "#start-image canvas")
    for side, value in (("left", "0"), ("top", "0"), ("width", "50"), ("height", "100")):
        page.fill(f"#start-image [data-side={side}]", value)
    page.page.locator("#start-image [data-do=fill]").press("Enter")
    set_slider(page, "Denoising strength", "1")
    (into,) = press(page, app, "#make")
    assert {"Init image hash", "Mask image hash"} <= {*fields_of(into)}
    mask = pixels(app.runs / "images" / "inputs" / f"{fields_of(into)['Mask image hash']}.png")
    middle = mask.shape[1] // 2
    assert (mask[:, : middle - 2] == 255).all()
    assert (mask[:, middle + 2 :] == 0).all()
    # At once: the next image may be asked for before the empty one has been drawn.
    painted = page.page.evaluate(CLEARED)
    assert painted == ["data:image/png", ""]
    (over,) = press(page, app, "#make")
    assert "Mask image hash" not in fields_of(over)
    assert fields_of(over)["Init image hash"] == fields_of(into)["Init image hash"]
    # An image that was painted into is repeated with its mask.
    page.page.evaluate("document.querySelector('#history').scrollIntoView({block: 'end'})")
    page.click(f"#history [data-value='{into.name}']")
    page.wait_text("#parameters", "Mask image hash")
    (same,) = press(page, app, "#image-again")
    assert same.read_bytes() == into.read_bytes()
    assert serious(page) == []


def test_no_press_is_early_and_what_acts_out_of_sight_is_said(
    visit: Callable[..., Visit], app: App
) -> None:
    page = visit()
    page.tab("Generate")
    set_up_images(page)
    page.wait_text("#acting", "^Also set above: Steps: 2$")
    page.reload()
    page.tab("Generate")
    page.wait_text("#acting", "^Also set above: Steps: 2$")
    assert page.page.locator("#steps").count() == 0
    # As long as the page fills in what was typed here before.
    page.page.evaluate("document.querySelector('.dd-pill').classList.add('dd-connecting')")
    pressed = list[str]()
    parts = page.page.evaluate("gradio_config.components.map(c => [c.id, c.props.elem_id])")
    names = dict(parts)

    def note(request: Any) -> None:
        if request.url.partition("?")[0].endswith("/queue/join"):
            pressed.append(names.get(request.post_data_json.get("trigger_id"), ""))

    page.page.on("request", note)
    for name in ("make", "side-by-side"):
        page.click(f"#{name}")
        page.page.locator(f"#{name}").press("Enter")
        page.page.locator(f"#{name}").press(" ")
    page.page.evaluate("document.querySelector('.dd-pill').classList.remove('dd-connecting')")
    press(page, app, "#make")
    assert [name for name in pressed if name in ("make", "side-by-side")] == ["make"]
    # What waits is taken back, which is no error.
    lock = Lock(Workspace(app.runs).device_lock)
    assert lock.take()
    try:
        page.click("#make")
        page.wait_text("#turn", "Waiting until the device is free")
        page.click("#turn [data-do=withdraw]")
        assert "The images were withdrawn; none of them was made" in page.toast()
    finally:
        lock.free()


def cards(page: Visit, count: int) -> None:
    page.wait("n => document.querySelectorAll('#history .dd-sample').length === n", count)


@pytest.fixture
def made(app: App) -> list[Path]:
    """Six images, the oldest first."""
    files = []
    for seed in range(6):
        image = Image.new("RGB", (64, 64), (0, 40 * seed, 90))
        text = f"a sks mug\nSteps: 2, Seed: {seed}, Size: 64x64"
        files.append(save_image(image, app.runs / "images" / f"made-{seed}.png", text))
        os.utime(files[-1], (1e9 + seed, 1e9 + seed))
    return files


def test_images_are_copied_and_deleted(
    visit: Callable[..., Visit], app: App, made: list[Path]
) -> None:
    page = visit()
    page.tab("Generate")
    cards(page, len(made))
    newest = made[-1]
    page.click("#history .dd-sample")
    page.wait_for(f"#images img[src*='{newest.name}']")
    page.page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.click("#parameters [data-copy]")
    page.wait("window.copied?.includes('Steps: 2')")
    page.wait_text("#parameters [data-copy]", "Copied")
    page.click("#image-delete")
    page.settle()
    app.until(lambda: not newest.exists())
    (question,) = page.asked
    assert question.startswith(f"Delete the image {newest.name}, ")
    cards(page, len(made) - 1)
    page.wait("!document.querySelector('#image-menu')?.checkVisibility()")
    assert images_of(app) == made[:-1]
