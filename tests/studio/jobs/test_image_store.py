"""All images: listed and searched with few looks at the disk, marked and deleted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_diffusion.sampling.images import INIT_IMAGE, MASK_IMAGE, save_image
from dora_diffusion.studio.jobs.image_store import PAGE, ImageStore, keep_input, read_input
from dora_diffusion.studio.jobs.store import UserError, Workspace

COUNT = 10_000


@pytest.fixture
def store(workspace: Workspace) -> ImageStore:
    return ImageStore(workspace)


def add(store: ImageStore, name: str, text: str, day: str = "") -> Path:
    path = save_image(Image.new("RGB", (8, 8)), store.workspace.images / name, text)
    if day:
        seconds = time.mktime(time.strptime(f"{day} 12:00", "%Y-%m-%d %H:%M"))
        os.utime(path, (seconds, seconds))
    return path


def test_images_are_listed_newest_first_and_their_texts_read_once(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a.png", "a Red mug\nNegative prompt: dull\nSteps: 3, Seed: 1", "2026-10-30")
    add(store, "b.png", "a red dog\nSteps: 3, Seed: 2", "2026-11-01")
    add(store, "c.png", "a dog\nSteps: 3, Seed: 3", "2026-11-29")
    add(store, "d.png", "", "2026-11-30")
    (store.workspace.images / "e.png").symlink_to("/etc/passwd")
    (store.workspace.images / "f.png").write_bytes(b"no image")
    os.utime(store.workspace.images / "f.png", (1e9, 1e9))
    opened = list[str]()
    open_image = Image.open

    def counting(path: Any, **options: Any) -> Any:
        opened.append(path)
        return open_image(path, **options)

    monkeypatch.setattr(Image, "open", counting)
    names = [entry.name for entry in store.entries()]
    assert names == ["d.png", "c.png", "b.png", "a.png", "f.png"]
    for _ in range(2):
        texts = [store.text(entry).partition("\n")[0] for entry in store.entries()]
        assert texts == ["", "a dog", "a red dog", "a Red mug", ""]
    assert len(opened) == 5
    before = store.stamp
    add(store, "g.png", "")
    assert store.stamp != before


def test_ten_thousand_images_are_listed_by_opening_one_page_of_them(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.results import page_of

    first = add(store, "00000.png", "a mug\nSteps: 3, Seed: 1")
    for number in range(1, COUNT):
        os.link(first, first.with_name(f"{number:05d}.png"))
    opened, scanned = list[str](), list[str]()
    open_image, scan = Image.open, os.scandir

    def counting(path: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return open_image(path, *args, **options)

    monkeypatch.setattr(Image, "open", counting)
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scan(path))
    page = page_of(store, {"from": 0, "count": 0})
    assert (page["count"], page["total"]) == (PAGE, COUNT)
    # Of each image of the page the text, and its pixels once for the small one.
    assert len(opened) == 2 * PAGE
    assert len({*opened}) == PAGE
    assert scanned == [str(first.parent)]
    assert len(page["cards"]) < PAGE * 1000
    assert page["cards"].count("thumbnails/") == PAGE
    scanned.clear()
    small = store.workspace.thumbnails
    sizes = [(small / name).stat().st_size for name in os.listdir(small)]
    assert len(sizes) == PAGE
    assert sum(sizes) < PAGE * 2000
    # What is known is not read again: by the same page, the clock, another visit.
    opened.clear()
    assert page_of(store, {"from": 0, "count": 0}) == page
    assert (opened, scanned) == ([], [])
    later = page_of(store, {"from": PAGE, "count": 0})
    assert (later["count"], len(opened)) == (PAGE, 2 * PAGE)
    assert later["cards"] != page["cards"]
    opened.clear()
    assert page_of(ImageStore(store.workspace), {})["cards"] == page["cards"]
    assert len(opened) == PAGE  # texts: the small ones are kept
    last = page_of(store, {"from": COUNT - 5, "count": 0})
    assert (last["count"], last["total"]) == (5, COUNT)
    # Thumbnails are made anew when the image is another one.
    opened.clear()
    add(store, "new.png", "another\nSteps: 3, Seed: 1")
    assert page_of(store, {})["total"] == COUNT + 1
    assert len(opened) == 2


def test_files_are_read_without_model_code() -> None:
    """The first page that shows images would wait for it."""
    code = "import sys, dora_diffusion.studio.jobs.image_store, dora_diffusion.sampling.images"
    check = f"{code}; sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    "asked", [None, [], {"from": -5, "count": "x"}, {"from": True, "count": 10**9}]
)
def test_whatever_is_asked_a_page_is_given(store: ImageStore, asked: Any) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.studio.app.views.results import page_of

    assert page_of(store, asked) == {"cards": "", "count": 0, "total": 0}
    add(store, "a.png", "a <b>mug</b>\nSteps: 3, Seed: 1")
    page = page_of(store, asked)
    assert (page["count"], page["total"]) == (1, 1)
    assert "a &lt;b&gt;mug" in page["cards"]


def test_a_deleted_image_takes_along_what_it_alone_was_painted_over(store: ImageStore) -> None:
    source, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    image, painted = keep_input(store.workspace, source), keep_input(store.workspace, mask)
    assert keep_input(store.workspace, source.copy()) == image
    inputs = f"{INIT_IMAGE}: {image}, {MASK_IMAGE}: {painted}"
    first = add(store, "a.png", f"a mug\nSteps: 3, Seed: 1, {inputs}")
    add(store, "b.png", f"a mug\nSteps: 3, Seed: 1, {INIT_IMAGE}: {image}")
    small = [store.thumbnail(entry) for entry in store.entries()]
    assert all(path is not None and path.is_file() for path in small)
    store.delete("a.png")
    assert not first.exists()
    assert [path.name for path in store.workspace.inputs.iterdir()] == [f"{image}.png"]
    kept = read_input(store.workspace, image)
    assert kept is not None
    assert kept.tobytes() == source.tobytes()
    store.delete("b.png")
    assert [*store.workspace.inputs.iterdir()] == []
    assert not any(path and path.exists() for path in small)
    with pytest.raises(UserError, match="no longer exists"):
        store.delete("b.png")
