"""The images of a runs folder with what made them, and the images that they are painted over.

::

    images/
      <id>-<seed>.png    generated images, each with its generation parameters
      favourites/        an empty file for each that was marked
      inputs/<md5>.png   images and masks that were painted over or into, by their pixels
      thumbnails/        a small JPEG of each that was listed, and of each run
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import DecompressionBombError

from dora_diffusion.data.images import DECODE_ERRORS
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.studio.jobs.image_generator import GeneratedImage
from dora_diffusion.studio.jobs.inputs import hashes_of
from dora_diffusion.studio.jobs.store import UserError, Workspace, confined

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = 24
_RECENT = 60
_THUMBNAIL_SIDE = 320
_DATE = re.compile(r"(\d{4}(-\d\d(-\d\d)?)?)?")


class _Entry(NamedTuple):
    """An image in the list."""

    name: str
    modified: int


@dataclass(frozen=True)
class Search:
    """Conditions of a search among images.

    Attributes:
        words: Words that all are in the prompt, the negative prompt or an adapter's name.
        run: Id of a run whose adapter was used.
        since: The first day, ``2026-11-29``, or the first month or year.
        until: The last one.
        only_favourites: Leave out images without a mark.

    Raises:
        UserError: If a date is none.
    """

    words: str = ""
    run: str = ""
    since: str = ""
    until: str = ""
    only_favourites: bool = False

    def __post_init__(self) -> None:
        for date in (self.since, self.until):
            try:
                if not _DATE.fullmatch(date):
                    raise ValueError(date)
                datetime.date.fromisoformat(date + "2026-01-01"[len(date) :])
            except ValueError:
                text = f"{date!r} is no date; write it as 2026-11-29, 2026-11 or 2026"
                raise UserError(text) from None

    def holds_date(self, modified: int) -> bool:
        day = time.strftime("%Y-%m-%d", time.localtime(modified / 1e9))
        return self.since <= day and (not self.until or day[: len(self.until)] <= self.until)

    def holds_text(self, text: str) -> bool:
        # Without the last line, of further settings.
        body = text.rpartition("\n")[0].casefold()
        return f"<lora:{self.run}" * bool(self.run) in body and all(
            word in body for word in self.words.casefold().split()
        )


class ImageStore:
    """The images of a runs folder. The list, and what a file says, are read once for each change.

    Args:
        workspace: The runs folder.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._lock = threading.Lock()
        self._listed: tuple[int, list[_Entry]] = (-1, [])
        self._texts: dict[_Entry, str] = {}

    @property
    def stamp(self) -> str:
        """A text that is another one when an image or a mark was added or removed."""
        folders = (self.workspace.images, self.workspace.favourites)
        return "-".join(str(folder.stat().st_mtime_ns) for folder in folders)

    def entries(self) -> list[_Entry]:
        """All images, newest first."""
        folder = self.workspace.images
        with self._lock:
            changed = folder.stat().st_mtime_ns
            if self._listed[0] != changed:
                found = []
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):  # It was deleted just now.
                        if entry.name.endswith(".png") and entry.is_file(follow_symlinks=False):
                            found.append((entry.stat().st_mtime_ns, entry.name))
                self._listed = changed, [_Entry(n, t) for t, n in sorted(found, reverse=True)]
                listed = {*self._listed[1]}
                # Others read more of them meanwhile.
                self._texts = {e: text for e, text in [*self._texts.items()] if e in listed}
            return self._listed[1]

    def text(self, entry: _Entry) -> str:
        """An image's generation parameters; empty where it has none or is damaged."""
        from dora_diffusion.sampling.images import read_parameters

        text = self._texts.get(entry)
        if text is None:
            try:
                text = read_parameters(self.workspace.images / entry.name) or ""
            except (*DECODE_ERRORS, DecompressionBombError):
                text = ""
            self._texts[entry] = text
        return text

    def search(self, search: Search) -> list[_Entry]:
        """The images that are searched for, newest first."""
        marked = self.favourites() if search.only_favourites else frozenset()
        return [
            entry
            for entry in self.entries()
            if search.holds_date(entry.modified)
            and (not search.only_favourites or entry.name in marked)
            and (not (search.words or search.run) or search.holds_text(self.text(entry)))
        ]

    def prompts(self, most: int) -> list[str]:
        """The different prompts of the newest images, newest first."""
        from dora_diffusion.sampling.images import parse_parameters

        read = (parse_parameters(self.text(entry)) for entry in self.entries()[:_RECENT])
        return [*dict.fromkeys(filter(None, (fields["Prompt"] for fields in read)))][:most]

    def thumbnail(self, entry: _Entry) -> Path | None:
        """A small JPEG of an image; see `kept_thumbnail`."""
        path = self.workspace.thumbnails / f"{entry.name}.jpg"
        return kept_thumbnail(self.workspace.images / entry.name, path, _pixels)

    def read(self, name: object) -> GeneratedImage:
        """An image by the name of its file.

        Raises:
            UserError: If there is none.
        """
        from dora_diffusion.sampling.images import parse_parameters

        path = confined(self.workspace.images, name)
        text = self.text(_Entry(path.name, path.stat().st_mtime_ns))
        seed = parse_parameters(text).get("Seed", "")
        return GeneratedImage(path, int(seed) if seed.isdecimal() else 0, text)

    def favourites(self) -> frozenset[str]:
        """The names of the images that are marked."""
        return frozenset(os.listdir(self.workspace.favourites))

    def toggle_favourite(self, name: object) -> bool:
        """Mark an image, or no longer. Returns whether it is marked now.

        Raises:
            UserError: If there is no such image.
        """
        mark = self.workspace.favourites / confined(self.workspace.images, name).name
        if mark.exists():
            mark.unlink()
            return False
        mark.touch()
        return True

    def delete(self, name: object) -> None:
        """Delete an image with its mark and thumbnail, and with what it alone was painted over.

        Raises:
            UserError: If there is no such image.
        """
        image = self.read(name)
        inputs = {*hashes_of(image.parameters)}
        image.path.unlink()
        (self.workspace.favourites / image.path.name).unlink(missing_ok=True)
        (self.workspace.thumbnails / f"{image.path.name}.jpg").unlink(missing_ok=True)
        if inputs:
            for entry in self.entries():
                inputs -= {*hashes_of(self.text(entry))}
        for unused in inputs:
            (self.workspace.inputs / f"{unused}.png").unlink(missing_ok=True)


def _pixels(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def kept_thumbnail(source: Path, path: Path, read: Callable[[Path], Image]) -> Path | None:
    """A small JPEG of an image, made the first time; None where the image is damaged.

    Args:
        source: The image.
        path: Where the small one is kept.
        read: Reads the image.
    """
    try:
        if path.is_file() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns:
            return path
        small = read(source)
    except (*DECODE_ERRORS, DecompressionBombError):
        return None
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    with atomic_file(path) as temporary:
        small.save(temporary, format="JPEG", quality=85)
    return path
