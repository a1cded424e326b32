"""Sheets of images with a title, a line of text above each row, and a label above each column."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SMALLEST_FONT, _IMAGES_PER_FONT = 12, 24
# A single small image must leave room for words.
_LEAST_CHARACTERS = 24
_GAP = 2
_LABEL = 52


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


def sheet(
    rows: Mapping[str, Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    columns: int = 11,
    side: int = 112,
) -> Image.Image:
    """Images under their labels, in bands of as many columns as fit, one row per model."""
    columns = min(columns, len(labels))
    bands = [labels[i : i + columns] for i in range(0, len(labels), columns)]
    left, gap = 64, 3
    step, band_height = side + gap, _LABEL + len(rows) * (side + gap) + 8
    canvas = Image.new("RGB", (left + columns * step, len(bands) * band_height), "white")
    draw = ImageDraw.Draw(canvas)
    for band, texts in enumerate(bands):
        top = band * band_height
        for x, text in enumerate(texts):
            draw.text((left + x * step, top + 4), _wrapped(text), fill="black", font_size=11)
        for y, (name, images) in enumerate(rows.items()):
            at = top + _LABEL + y * step
            draw.text((4, at + side // 2 - 6), name, fill="black", font_size=12)
            for x, image in enumerate(images[band * columns : band * columns + len(texts)]):
                filters = Image.Resampling
                how = filters.BICUBIC if image.width < side else filters.LANCZOS
                canvas.paste(center_square(image).resize((side, side), how), (left + x * step, at))
    return canvas


def _wrapped(text: str, width: int = 19, lines: int = 3) -> str:
    return "\n".join(textwrap.wrap(text, width)[:lines])


def center_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle of an image, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))
