"""Generated images of a runs folder, with their generation parameters and input images.

::

    images/
      <id>-<seed>.png    generated images, each with its generation parameters
      favourites/        an empty file for each marked image
      inputs/<md5>.png   input images and masks, named by the hash of their pixels
      thumbnails/        a small JPEG of each listed image, and of each run
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
from dora_diffusion.formats.parameters import lora_tag
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
        words: Words that must all be in the prompt, the negative prompt or an adapter's name.
        run: Id of a run whose adapter was used.
        since: First day, ``2026-11-29``, or first month or year.
        until: Last day, month or year.
        only_favourites: True to omit images that are not favourites.

    Raises:
        UserError: If a date is invalid.
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
                text = f"{date!r} is not a date; write it as 2026-11-29, 2026-11 or 2026"
                raise UserError(text) from None

    def holds_date(self, modified: int) -> bool:
        day = time.strftime("%Y-%m-%d", time.localtime(modified / 1e9))
        return self.since <= day and (not self.until or day[: len(self.until)] <= self.until)

    def holds_text(self, text: str) -> bool:
        # The last line, with further settings, is not searched.
        body = text.rpartition("\n")[0].casefold()
        return lora_tag(self.run)[:-1] * bool(self.run) in body and all(
            word in body for word in self.words.casefold().split()
        )


class ImageStore:
    """Images of a runs folder, with a cached list and cached parameters.

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
        """Text that changes when an image or a mark is added or removed."""
        folders = (self.workspace.images, self.workspace.favourites)
        return "-".join(str(folder.stat().st_mtime_ns) for folder in folders)

    def entries(self) -> list[_Entry]:
        """Return all images, newest first."""
        folder = self.workspace.images
        with self._lock:
            changed = folder.stat().st_mtime_ns
            if self._listed[0] != changed:
                images = []
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):  # deleted just now
                        if entry.name.endswith(".png") and entry.is_file(follow_symlinks=False):
                            images.append((entry.stat().st_mtime_ns, entry.name))
                self._listed = changed, [_Entry(n, t) for t, n in sorted(images, reverse=True)]
                listed = {*self._listed[1]}
                # A copy, because other threads add texts meanwhile.
                self._texts = {e: text for e, text in [*self._texts.items()] if e in listed}
            return self._listed[1]

    def text(self, entry: _Entry) -> str:
        """Return an image's generation parameters; empty if they are missing or damaged."""
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
        """Return the images that match a search, newest first."""
        marked = self.favourites() if search.only_favourites else frozenset()
        return [
            entry
            for entry in self.entries()
            if search.holds_date(entry.modified)
            and (not search.only_favourites or entry.name in marked)
            and (not (search.words or search.run) or search.holds_text(self.text(entry)))
        ]

    def prompts(self, most: int) -> list[str]:
        """Return the distinct prompts of recent images, newest first."""
        from dora_diffusion.sampling.images import parse_parameters

        read = (parse_parameters(self.text(entry)) for entry in self.entries()[:_RECENT])
        return [*dict.fromkeys(filter(None, (fields["Prompt"] for fields in read)))][:most]

    def thumbnail(self, entry: _Entry) -> Path | None:
        """Return a small JPEG of an image; see `kept_thumbnail`."""
        path = self.workspace.thumbnails / f"{entry.name}.jpg"
        return kept_thumbnail(self.workspace.images / entry.name, path, _pixels)

    def read(self, name: object) -> GeneratedImage:
        """Read an image by its file name.

        Raises:
            UserError: If the image does not exist.
        """
        from dora_diffusion.sampling.images import parse_parameters

        path = confined(self.workspace.images, name)
        text = self.text(_Entry(path.name, path.stat().st_mtime_ns))
        seed = parse_parameters(text).get("Seed", "")
        return GeneratedImage(path, int(seed) if seed.isdecimal() else 0, text)

    def favourites(self) -> frozenset[str]:
        """Return the names of the marked images."""
        return frozenset(os.listdir(self.workspace.favourites))

    def toggle_favourite(self, name: object) -> bool:
        """Mark an image, or remove its mark. Returns whether it is marked now.

        Raises:
            UserError: If the image does not exist.
        """
        mark = self.workspace.favourites / confined(self.workspace.images, name).name
        if mark.exists():
            mark.unlink()
            return False
        mark.touch()
        return True

    def delete(self, name: object) -> None:
        """Delete an image, its mark and thumbnail, and input images that no other image uses.

        Raises:
            UserError: If the image does not exist.
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
    """Return a small JPEG of an image, created on the first call; None if the image is damaged.

    Args:
        source: The image.
        path: Path of the small JPEG.
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
