"""Digests of a run's photos, kept in its folder: enough to know a photo again.

They stay beside the run and never go into the adapter file, which is made to be given away: whoever
has a photo could tell from a digest that it was trained on. Nothing else is kept, no name and no
path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dora_diffusion.data.photos import Photo
from dora_diffusion.formats.files.atomic import save_text

PHOTO_RECORD = "photos.json"


def write_photo_record(folder: Path, photos: Iterable[Photo]) -> Path:
    """Write the digests of the photos that a run trains on."""
    digests = sorted(photo.digest for photo in photos)
    return save_text(folder / PHOTO_RECORD, json.dumps({"digests": digests}) + "\n")


def read_photo_record(adapter: str | Path) -> frozenset[str] | None:
    """The digests of the photos that an adapter was trained on, None if they are not known.

    Args:
        adapter: A run's folder, one of its checkpoints, or an adapter file in either.
    """
    path = Path(adapter).expanduser().resolve()
    for folder in (path, path.parent, path.parent.parent):
        try:
            record = json.loads((folder / PHOTO_RECORD).read_text(encoding="utf-8"))
            return frozenset(map(str, record["digests"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None
