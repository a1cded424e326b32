"""Images and masks that images are painted over or into, each kept once by its pixels."""

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
    """The hashes of an image's inputs."""
    from dora_diffusion.sampling.images import INIT_IMAGE, MASK_IMAGE, parse_parameters

    fields = parse_parameters(text)
    return (fields[key] for key in (INIT_IMAGE, MASK_IMAGE) if _HASH.fullmatch(fields.get(key, "")))


def keep_input(workspace: Workspace, image: Image) -> str:
    """Keep an image, or a mask ("L"), to paint over: under the name of its pixels, once.

    Returns:
        Its name, which is the hash that images made of it state (`images.painted_fields`).
    """
    from dora_diffusion.sampling.images import pixel_hash, save_image

    name = pixel_hash(image, image.mode)
    path = workspace.inputs / f"{name}.png"
    if not path.exists():
        save_image(image, path)
    return name


def input_path(workspace: Workspace, name: object) -> Path | None:
    """The file of an image or a mask that was kept; None where it is not here."""
    path = workspace.inputs / f"{name}.png"
    return path if _HASH.fullmatch(str(name)) and path.is_file() else None


def read_input(workspace: Workspace, name: object) -> Image | None:
    """An image or a mask that was kept; None without a name.

    Raises:
        UserError: If it is gone.
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
