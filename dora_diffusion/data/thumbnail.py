"""The small picture inside a file that adapter managers show."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

from dora_diffusion.data.images import open_photo

_SIDE = 256


def thumbnail(path: str | Path) -> str:
    """A picture as the data URI of a small JPEG, without the file's name, place or date.

    Raises:
        ValueError, OSError: If it is not a picture.
    """
    # A sheet of many samples may be larger than a photo, and a strip.
    path = Path(path).expanduser()
    picture = open_photo(path, max_megapixels=math.inf, max_aspect=math.inf)
    picture.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
