"""``house.svg``: the layers of the package and their arrows, from the contracts in pyproject.toml.

A layer may import all that is below it. Packages of one layer do not import each other.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT, STEP, MARGIN = 860, 34, 50, 14
# Colours that are read on a light page and on a dark one: every box has its own background.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c2733 }
.name { font-weight: 600 }
rect { fill: #e8f0f8; stroke: #5b7c99 }
path { stroke: #5b7c99; stroke-width: 1.5; fill: none }
"""


def layers() -> list[list[str]]:
    """The layers, the highest first, each with the packages and modules that share it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    [contract] = [each for each in contracts if each["type"] == "layers"]
    return [
        [name.strip().removeprefix("dora_diffusion.") for name in layer.split("|")]
        for layer in contract["layers"]
    ]


def purpose(name: str) -> str:
    """The first sentence of a module's docstring."""
    folder = ROOT / "dora_diffusion" / name.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return (
        text.partition("\n\n")[0].partition(". ")[0].replace("\n", " ").replace("`", "").rstrip(".")
    )


def svg() -> str:
    """The image as text."""
    rows = layers()
    height = 2 * MARGIN + (len(rows) - 1) * STEP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Layers of the package; imports point down">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" style="fill:#5b7c99"/>'
        "</marker></defs>",
    ]
    for index, names in enumerate(rows):
        top = MARGIN + index * STEP
        if index:
            arrow = f"M{WIDTH // 2},{top - STEP + HEIGHT} V{top - 1}"
            parts.append(f'<path d="{arrow}" marker-end="url(#tip)"/>')
        width = (WIDTH - (len(names) + 1) * MARGIN) / len(names)
        for place, name in enumerate(names):
            left = MARGIN + place * (width + MARGIN)
            parts += _box(name, left, top, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(name: str, left: float, top: float, width: float) -> list[str]:
    """A package, with what it is for as far as there is space; all of it when pointed at."""
    text = purpose(name)
    room = int((width - 24 - 8 * len(name)) / 7)
    shown = (
        text
        if len(text) <= room
        else text[: max(room - 1, 0)].rsplit(" ", 1)[0].rstrip(",:") + " …"
    )
    return [
        f"<g><title>{escape(text)}</title>",
        f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{HEIGHT}" rx="5"/>',
        f'<text x="{left + 10:g}" y="{top + 22}"><tspan class="name">{escape(name)}</tspan>'
        f'<tspan dx="10">{escape(shown) if room > 12 else ""}</tspan></text></g>',
    ]


def draw(name: str, output: Path, work: Path, steps: int | None = None) -> list[Path]:
    """Write ``NAME.svg``; it takes no training."""
    file = output / f"{name}.svg"
    file.write_text(svg(), encoding="utf-8")
    return [file]
