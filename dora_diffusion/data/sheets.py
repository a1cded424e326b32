"""Sheets of images with a title, a label above each row, and a label above each column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_SMALLEST_FONT, _IMAGES_PER_FONT = 12, 24
# Minimum width of a sheet in characters, also for a single small image.
_LEAST_CHARACTERS = 24
_GAP = 2
# Limit of a column's label.
_MOST_LINES = 3


def labelled_sheet(
    images: Sequence[Image.Image], title: str, rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Arrange images on white, with labels in a font size that suits the images.

    Args:
        images: Images row by row; all images of a row have the same size.
        title: Title; empty: none.
        rows: Label of each row, with any number of lines.
        columns: Label of each column, with at most three lines.
    """
    width, count = images[0].width, len(columns)
    size = max(_SMALLEST_FONT, width // _IMAGES_PER_FONT)
    widest_image = max(image.width for image in images)
    total = max(count * (widest_image + _GAP) - _GAP, _LEAST_CHARACTERS * size // 2)
    labels = [_text_image(label, size, width, _MOST_LINES) for label in columns]
    strips = [_text_image(title, size, total)] if title else []
    strips.append(image_grid(labels, count))
    for number, row in enumerate(rows):
        grid = image_grid(images[number * count : (number + 1) * count], count)
        strips += [_text_image(row, size, total), ImageOps.expand(grid, (0, 0, 0, _GAP), "white")]
    return image_grid(strips, 1, gap=0)


def one_image(sheet: Image.Image, width: int, height: int) -> Image.Image:
    """Cut the first image of the last row from a labelled sheet; a gap follows the row."""
    bottom = sheet.height - _GAP
    return sheet.crop((0, bottom - height, width, bottom))


def _text_image(text: str, size: int, width: int, most: int | None = None) -> Image.Image:
    """Draw a text on white, wrapped to a width and a limit of lines; long words are broken."""
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
    """Arrange images under their labels in bands of columns, with one row per model."""
    bands = []
    for at in range(0, len(labels), columns):
        band = slice(at, at + columns)
        cells = [_cell(image, side) for images in rows.values() for image in images[band]]
        bands.append(labelled_sheet(cells, "", list(rows), labels[band]))
    return image_grid(bands, 1)


def _cell(image: Image.Image, side: int) -> Image.Image:
    filters = Image.Resampling
    filter_kind = filters.BICUBIC if image.width < side else filters.LANCZOS
    return center_square(image).resize((side, side), filter_kind)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = _GAP) -> Image.Image:
    """Arrange images in rows on white."""
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
    """Largest central square of an image, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))
