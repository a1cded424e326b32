"""Images of noise on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def write_images() -> Callable[..., list[Path]]:
    """Write ``count`` images of noise, of ``size`` (height, width), as 00.png, 01.png, ..."""

    def write(
        folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 60)
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        paths = [folder / f"{index:02d}.png" for index in range(count)]
        for path in paths:
            Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)
        return paths

    return write
