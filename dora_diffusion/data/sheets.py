"""Sheets of images with a title, a line of text above each row, and a label above each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_SMALLEST_FONT, _IMAGES_PER_FONT = 12, 24
# A single small image must leave room for words.
_LEAST_CHARACTERS = 24
_GAP = 2
# Most lines of a column's label.
_MOST_LINES = 3


def labelled_sheet(
    images: Sequence[Image.Image], title: str, rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Images on white, with their labels in letters that fit the images' size.

    Args:
        images: Images row by row; the images of a row have one size.
        title: Title above all rows; empty: none.
        rows: Label above each row, in as many lines as it needs.
        columns: Label above each column, in three lines at most.
    """
    width, count = images[0].width, len(columns)
    size, widest = max(_SMALLEST_FONT, width // _IMAGES_PER_FONT), max(i.width for i in images)
    total = max(count * (widest + _GAP) - _GAP, _LEAST_CHARACTERS * size // 2)
    labels = [_written(label, size, width, _MOST_LINES) for label in columns]
    parts = [_written(title, size, total)] if title else []
    parts.append(image_grid(labels, count))
    for number, row in enumerate(rows):
        shown = image_grid(images[number * count : (number + 1) * count], count)
        parts += [_written(row, size, total), ImageOps.expand(shown, (0, 0, 0, _GAP), "white")]
    return image_grid(parts, 1, gap=0)


def one_image(sheet: Image.Image, width: int, height: int) -> Image.Image:
    """The first image of a labelled sheet's last row, which ends the sheet but for a gap."""
    bottom = sheet.height - _GAP
    return sheet.crop((0, bottom - height, width, bottom))


def _written(text: str, size: int, width: int, most: int | None = None) -> Image.Image:
    """A text on white, in at most so many lines of a width, to which long words are broken."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 4:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width - 4:
                lines.append("")
            lines[-1] += letter
    lines, height = lines[:most], size + size // 3
    strip = Image.new("RGB", (width, height * len(lines)), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(strip).text((2, number * height), line, fill="black", font=font)
    return strip


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
    return image_grid(bands, 1)


def _cell(image: Image.Image, side: int) -> Image.Image:
    filters = Image.Resampling
    how = filters.BICUBIC if image.width < side else filters.LANCZOS
    return center_square(image).resize((side, side), how)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = _GAP) -> Image.Image:
    """Images in rows, on white."""
    rows = [images[at : at + columns] for at in range(0, len(images), columns)]
    width = max(image.width for image in images) + gap
    heights, y = [max(image.height for image in row) + gap for row in rows], 0
    grid = Image.new("RGB", (columns * width - gap, sum(heights) - gap), "white")
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            grid.paste(image, (column * width, y))
        y += height
    return grid


def center_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle of an image, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))
