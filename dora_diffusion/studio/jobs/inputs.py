"""Stored inputs of generation: input images and masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.studio.jobs.store import UserError, Workspace

if TYPE_CHECKING:
    from PIL.Image import Image

_HASH = re.compile(r"[0-9a-f]{32}")


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
