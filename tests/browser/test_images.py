"""Images as a person keeps and changes them: several adapters, image to image, masks, the menu.

No run begins: what made the adapters is there, and another app leads the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.sampling.images import parse_parameters, read_parameters
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import Lock
from dora_diffusion.studio.jobs.store import Workspace, write_json
from tests.browser.test_app import images_of, press, set_slider, set_up_images
from tests.studio.jobs.helpers import METRICS, make

Visit = App = Any


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, random_adapter: Callable[..., Any]
) -> Iterator[Path]:
    """Two runs with an adapter each of a tiny model."""
    workspace = Workspace(tmp_path_factory.mktemp("images") / "runs").make()
    lock = Lock(workspace.queue_lock)
    assert lock.take()
    for seed, title in enumerate(("first", "second")):
        model = {"pretrained_model_name_or_path": str(sd1_folder), "max_train_steps": 3}
        folder = make(workspace, title, token="sks", class_word="mug", **model)
        (folder / "metrics.jsonl").write_text(METRICS.format(step=3), encoding="utf-8")
        layers = random_adapter(sd1_folder, seed=seed, every=9)
        adapter = AdapterFile(layers, AdapterMetadata("sd1", trigger="sks mug"))
        write_adapter(folder / "pytorch_lora_weights.safetensors", adapter)
        write_json(folder / records.RESULT, {"code": 0})
    yield workspace.root
    lock.free()


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


def choose_image(page: Visit, image: Path, newest: Path) -> None:
    """Click an image in the list of all, which is drawn anew until the newest one is in it."""
    page.wait_for(f"#history [data-value='{newest.name}']")
    page.click(f"#history [data-value='{image.name}']")


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
    (again,) = press(page, app, "#image-again")
    assert again.read_bytes() == first.read_bytes()
    (varied,) = press(page, app, "#image-vary")
    assert (pixels(varied) != pixels(first)).any()
    assert fields_of(varied)["Seed"] != "7"
    (large,) = press(page, app, "#image-hires")
    assert pixels(large).shape[0] == 1.5 * pixels(first).shape[0]
    # The first one again, from the list of all; then into its left half, without a mouse.
    choose_image(page, first, newest=large)
    page.wait_text("#parameters", "Seed: 7,")
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
    choose_image(page, into, newest=over)
    page.wait_text("#parameters", "Mask image hash")
    (same,) = press(page, app, "#image-again")
    assert same.read_bytes() == into.read_bytes()
    page.press("button", "Search")
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
    assert page.page.locator("#generate-Steps").count() == 0
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
    page.click("#make")
    page.wait_text("#turn", "Waiting until the device is free")
    page.click("#turn [data-do=withdraw]")
    assert "The images were withdrawn; none of them was made" in page.toast()
    lock.free()


def serious(page: Visit) -> list[str]:
    """Serious violations that axe-core finds on the page, in both schemes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = []
    for scheme in ("dark", "light"):
        page.page.emulate_media(color_scheme=scheme)
        page.settle()
        for one in axe.run(page.page).response["violations"]:
            if one["impact"] in ("serious", "critical"):
                found += [f"{scheme}: {one['id']}: {node['html']}" for node in one["nodes"]]
    return found


def cards(page: Visit, count: int) -> None:
    page.wait("n => document.querySelectorAll('#history .dd-sample').length === n", count)


def test_images_are_found_marked_copied_and_deleted(visit: Callable[..., Visit], app: App) -> None:
    page = visit()
    page.tab("Generate")
    count = len(images_of(app))
    assert count > 5
    cards(page, count)
    newest = max(images_of(app), key=lambda path: path.stat().st_mtime_ns)
    page.click("#history .dd-sample")
    page.wait_for(f"#images img[src*='{newest.name}']")
    page.click("#image-star")
    page.wait_text("#image-star", "★")
    page.wait_text("#history .dd-sample", "★")
    page.press("button", "Search")
    page.check("Favourites only")
    cards(page, 1)
    page.fill("#find-words input, #find-words textarea", "elephant")
    page.wait_text("#history", "Nothing found")
    page.fill("#find-words input, #find-words textarea", "sks MUG")
    cards(page, 1)
    page.page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.click("#image-copy")
    page.wait("window.copied?.includes('Steps: 2')")
    assert "Copied" in page.toast()
    page.click("#image-delete")
    app.until(lambda: not newest.exists())
    page.wait_text("#history", "Nothing found")
    page.wait("!document.querySelector('#image-menu')?.checkVisibility()")
    assert len(images_of(app)) == count - 1
