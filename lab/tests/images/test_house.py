"""The image of the layers: that it is the one of the contracts, and shows every module."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tools.images.house import layers, svg

ROOT = Path(__file__).parents[3]
SPACE = "{http://www.w3.org/2000/svg}"


def test_the_image_in_the_documents_is_that_of_the_contracts() -> None:
    """If not: ``python -m tools.images house``."""
    file = ROOT / "docs" / "images" / "house.svg"
    assert file.read_text(encoding="utf-8") == svg()


def test_every_package_is_in_one_box_above_what_it_imports() -> None:
    package = ROOT / "dora_diffusion"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    shown = [name for row in layers() for name in row]
    assert {name.partition(".")[0] for name in shown} == there - {"__init__", "__pycache__"}
    assert len(set(shown)) == len(shown)
    root = ElementTree.fromstring(svg())
    boxes = root.findall(f"{SPACE}g")
    heights = {
        box.findtext(f"{SPACE}text/{SPACE}tspan"): float(box.find(f"{SPACE}rect").get("y"))  # type: ignore[union-attr,arg-type]
        for box in boxes
    }
    assert list(heights) == shown
    assert heights["cli"] < heights["training"] < heights["adapters"] < heights["numerics"]
    assert heights["__main__"] == heights["studio.worker"]
    arrows = [path for path in root.findall(f"{SPACE}path") if path.get("marker-end")]
    assert len(arrows) == len(layers()) - 1
