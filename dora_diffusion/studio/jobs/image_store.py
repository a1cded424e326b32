"""Generated images of a runs folder, with their generation parameters and input images.

::

    images/
      <id>-<seed>.png    generated images, each with its generation parameters
      inputs/<md5>.png   input images and masks, named by the hash of their pixels
      thumbnails/        a small JPEG of each listed image, and of each run
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import DecompressionBombError

from dora_diffusion.data.images import DECODE_ERRORS, PhotoError, open_photo
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.studio.jobs.image_generator import GeneratedImage
from dora_diffusion.studio.jobs.store import UserError, Workspace, confined

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = 24
_THUMBNAIL_SIDE = 320
_HASH = re.compile(r"[0-9a-f]{32}")


class _Entry(NamedTuple):
    """An image in the list."""

    name: str
    modified: int


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
        """Text that changes when an image is added or removed."""
        return str(self.workspace.images.stat().st_mtime_ns)

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

    def delete(self, name: object) -> None:
        """Delete an image, its thumbnail, and input images that no other image uses.

        Raises:
            UserError: If the image does not exist.
        """
        image = self.read(name)
        inputs = {*hashes_of(image.parameters)}
        image.path.unlink()
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


def hashes_of(text: str) -> Iterator[str]:
    """Return the hashes of the input images in an image's parameters."""
    from dora_diffusion.sampling.images import INIT_IMAGE, MASK_IMAGE, parse_parameters

    fields = parse_parameters(text)
    return (fields[key] for key in (INIT_IMAGE, MASK_IMAGE) if _HASH.fullmatch(fields.get(key, "")))


def keep_input(workspace: Workspace, image: Image) -> str:
    """Store an input image or a mask ("L") under the hash of its pixels, once.

    Returns:
        The hash, as in the parameters of images made from it (`images.painted_fields`).
    """
    from dora_diffusion.sampling.images import pixel_hash, save_image

    name = pixel_hash(image, image.mode)
    path = workspace.inputs / f"{name}.png"
    if not path.exists():
        save_image(image, path)
    return name


def input_path(workspace: Workspace, name: object) -> Path | None:
    """Return the path of a stored image or mask; None if it does not exist."""
    path = workspace.inputs / f"{name}.png"
    return path if _HASH.fullmatch(str(name)) and path.is_file() else None


def read_input(workspace: Workspace, name: object) -> Image | None:
    """Read a stored image or mask; None if the name is empty.

    Raises:
        UserError: If the file does not exist or cannot be read.
    """
    if not name:
        return None
    path = input_path(workspace, name)
    if path is None:
        raise UserError("the image to start from is no longer here; choose it again")
    try:
        return open_photo(path)
    except PhotoError as error:
        raise UserError(f"the image to start from cannot be read ({error})") from error
