"""A grid of images as a web page that needs no server, and as one labelled sheet."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from PIL import Image

from dora_diffusion.data.images import open_photo
from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.formats.files.atomic import atomic_file, save_text
from dora_diffusion.sampling.images import save_image

PAGE, SHEET, RECORD = "index.html", "sheet.png", "grid.json"
_TEMPLATE = Path(__file__).with_name("page.html")
_MOST_PIXELS = 2**26


@dataclass
class GridRecord:
    """A grid's axes and images.

    Attributes:
        axes: The labels of each axis's values, by its name.
        files: The image of each cell, relative to the grid's folder; the last axis moves first.
        seed: The seed of cells that no axis gives one.
        texts: The parameters of each image that is there.
    """

    axes: Mapping[str, Sequence[str]]
    files: Sequence[str]
    seed: int
    texts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def seed_of(folder: Path) -> int | None:
        """The seed of the grid in a folder; None where there is none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((folder / RECORD).read_text(encoding="utf-8"))["seed"])
        return None

    def write(self, folder: Path) -> Path:
        """Write the page and its data; the page is returned.

        Raises:
            DiskFullError: If there is no room; a page that was there is unchanged.
        """
        axes = [{"name": name, "values": list(labels)} for name, labels in self.axes.items()]
        texts = {file: self.texts[file] for file in self.files if file in self.texts}
        record = {"seed": self.seed, "axes": axes, "files": list(self.files), "texts": texts}
        save_text(folder / RECORD, json.dumps(record, indent=1))
        return save_text(folder / PAGE, page({"title": folder.resolve().name, **record}))

    def pack(self, folder: Path, archive: Path) -> Path:
        """Put the page with all images into a zip, which is returned."""
        with atomic_file(archive) as temporary, zipfile.ZipFile(temporary, "w") as packed:
            for name in (PAGE, SHEET, RECORD, *dict.fromkeys(self.files)):
                packed.write(folder / name, f"{folder.name}/{name}")
        return archive

    def write_sheet(self, folder: Path) -> Path:
        """Write all cells as one image: the first axis across, the others down.

        It has the parameters of the first cell, as a grid of A1111 has.
        """
        (first, columns), *others = self.axes.items()
        rows = list(product(*(range(len(labels)) for _, labels in others)))
        below = [f"{name}: " for name, _ in others]
        names = [
            "  ·  ".join(
                text + labels[at] for text, (_, labels), at in zip(below, others, row, strict=True)
            )
            for row in rows
        ]
        files = [
            self.files[n * len(rows) + r] for r in range(len(rows)) for n in range(len(columns))
        ]
        images = _opened([folder / file for file in files])
        title = f"Across: {first}" + f"  ·  seed {self.seed}" * ("seed" not in self.axes)
        made = labelled_sheet(images, title, names, list(columns))
        return save_image(made, folder / SHEET, self.texts[self.files[0]])


def _opened(files: Sequence[Path]) -> list[Image.Image]:
    """Images, all smaller by one factor where a sheet of them would be too large."""
    sizes = {}
    for file in dict.fromkeys(files):
        with Image.open(file) as header:
            sizes[file] = header.size
    total = sum(math.prod(sizes[file]) for file in files)
    factor = min(1.0, (_MOST_PIXELS / total) ** 0.5)
    images = {}
    for file, (width, height) in sizes.items():
        image = open_photo(file, limited=False)
        if factor < 1:
            size = max(1, round(width * factor)), max(1, round(height * factor))
            image = image.resize(size, Image.Resampling.LANCZOS)
        images[file] = image
    return [images[file] for file in files]


def page(record: Mapping[str, object]) -> str:
    """The page of a grid, of what grid.json holds and its title.

    Prompts may be anybody's: no text can end the script that holds them.
    """
    data = json.dumps(record).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{DATA}", data, 1)
