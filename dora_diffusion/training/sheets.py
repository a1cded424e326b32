"""Sheets of images with a title, a line of text above each row, and a label above each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SMALLEST_FONT, _IMAGES_PER_FONT = 12, 24
# A single small image must leave room for words.
_LEAST_CHARACTERS = 24
_GAP = 2


def labelled_sheet(
    images: Sequence[Image.Image],
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
) -> Image.Image:
    """Images on white, with their labels in letters that fit the images' size.

    Args:
        images: Row by row; those of a row are of one size.
        title: Above all.
        rows: What is written above each row, in as many lines as it takes.
        columns: What is written above each column.
    """
    width, sizes = images[0].width, [image.size for image in images[:: len(columns)]]
    text, widest = _Text(max(_SMALLEST_FONT, width // _IMAGES_PER_FONT)), max(sizes)[0]
    total = max(len(columns) * (widest + _GAP) - _GAP, _LEAST_CHARACTERS * text.size // 2)
    titled = [text.wrap(row, total) for row in rows]
    head = text.wrap(title, total)
    lines = len(head) + 1 + sum(len(row) for row in titled)
    heights = sum(height + _GAP for _, height in sizes)
    sheet = Image.new("RGB", (total, lines * text.line + heights), "white")
    y = text.draw(sheet, head, 0)
    for column, label in enumerate(columns):
        text.draw(sheet, text.wrap(label, width)[:1], y, column * (width + _GAP))
    y += text.line
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
