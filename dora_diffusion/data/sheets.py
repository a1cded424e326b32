"""Sheets of images with a title, a line of text above each row, and a label above each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SMALLEST_FONT, _IMAGES_PER_FONT = 12, 24
# A single small image must leave room for words.
_LEAST_CHARACTERS = 24
_GAP = 2
# Of a column's label.
_MOST_LINES = 3


def labelled_sheet(
    images: Sequence[Image.Image],
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
) -> Image.Image:
    """Images on white, with their labels in letters that fit the images' size.

    Args:
        images: Row by row; those of a row are of one size.
        title: Above all; none where it is empty.
        rows: What is written above each row, in as many lines as it takes.
        columns: What is written above each column, in three lines at most.
    """
    width, sizes = images[0].width, [image.size for image in images[:: len(columns)]]
    text, widest = _Text(max(_SMALLEST_FONT, width // _IMAGES_PER_FONT)), max(sizes)[0]
    total = max(len(columns) * (widest + _GAP) - _GAP, _LEAST_CHARACTERS * text.size // 2)
    titled = [text.wrap(row, total) for row in rows]
    head = text.wrap(title, total) if title else []
    labels = [text.wrap(label, width)[:_MOST_LINES] for label in columns]
    above = max(map(len, labels))
    lines = len(head) + above + sum(len(row) for row in titled)
    heights = sum(height + _GAP for _, height in sizes)
    sheet = Image.new("RGB", (total, lines * text.line + heights), "white")
    y = text.draw(sheet, head, 0)
    for column, label in enumerate(labels):
        text.draw(sheet, label, y, column * (width + _GAP))
    y += above * text.line
    for number, (row, (width, height)) in enumerate(zip(titled, sizes, strict=True)):
        y = text.draw(sheet, row, y)
        for column in range(len(columns)):
            sheet.paste(images[number * len(columns) + column], (column * (width + _GAP), y))
        y += height + _GAP
    return sheet


def one_image(sheet: Image.Image, width: int, height: int) -> Image.Image:
    """The first image of a labelled sheet's last row, which ends the sheet but for a gap."""
    bottom = sheet.height - _GAP
    return sheet.crop((0, bottom - height, width, bottom))


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets above each other."""
    size = (max(sheet.width for sheet in sheets), sum(sheet.height + _GAP for sheet in sheets))
    whole, y = Image.new("RGB", size, "white"), 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height + _GAP
    return whole


@dataclass
class _Text:
    """Letters of one size, in pixels."""

    size: int
    font: Any = field(init=False)

    def __post_init__(self) -> None:
        self.font = ImageFont.load_default(self.size)

    @property
    def line(self) -> int:
        return self.size + self.size // 3

    def wrap(self, text: str, width: int) -> list[str]:
        """Break a text into lines of at most ``width`` pixels; a longer word is cut."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.font.getlength(longer) <= width - 4:
                lines[-1] = longer
                continue
            while self.font.getlength(word) > width - 4 and len(word) > 1:
                word = word[:-1]
            lines = [*lines, word] if lines[-1] else [word]
        return lines

    def draw(self, sheet: Image.Image, lines: Sequence[str], y: int, x: int = 0) -> int:
        """Write lines from ``y`` on. Returns where the next one begins."""
        draw = ImageDraw.Draw(sheet)
        for line in lines:
            draw.text((x + 2, y), line, fill="black", font=self.font)
            y += self.line
        return y


def sheet(
    rows: Mapping[str, Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    columns: int = 11,
    side: int = 112,
) -> Image.Image:
    """Images under their labels, in bands of as many columns as fit, one row per model."""
    bands = []
    for at in range(0, len(labels), columns):
        band = slice(at, at + columns)
        cells = [_cell(image, side) for images in rows.values() for image in images[band]]
        bands.append(labelled_sheet(cells, "", list(rows), labels[band]))
    return stacked(bands)


def _cell(image: Image.Image, side: int) -> Image.Image:
    filters = Image.Resampling
    how = filters.BICUBIC if image.width < side else filters.LANCZOS
    return center_square(image).resize((side, side), how)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = _GAP) -> Image.Image:
    """Images of one size in rows, on white."""
    width, height = (side + gap for side in images[0].size)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def center_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle of an image, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))
