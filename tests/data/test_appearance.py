"""Statistics of photos' appearance, against a plain computation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dora_diffusion.data.images import appearance_of, blur, fingerprint


def blur_along_rows(grey: np.ndarray) -> float:
    """The paper's equations, pixel by pixel; the mean at an edge is of what is there."""
    smooth = np.array(
        [[row[max(0, x - 4) : x + 5].mean() for x in range(len(row))] for row in grey]
    )
    change = np.abs(np.diff(grey, axis=1))
    lost = np.maximum(0, change - np.abs(np.diff(smooth, axis=1)))
    return (change.sum() - lost.sum()) / change.sum()


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("radius", [0, 2])
def test_blur_is_that_of_the_paper_in_the_worse_direction(size, radius) -> None:
    values = np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    image = Image.fromarray(values).filter(ImageFilter.BoxBlur((radius, 0)))
    grey = np.asarray(image).astype(np.float64)
    expected = max(blur_along_rows(grey), blur_along_rows(grey.T))
    assert blur(image, side=32) == pytest.approx(expected, abs=1e-5)
    assert radius == 0 or expected > 0.15 > blur(Image.fromarray(values), side=32)


def test_a_fingerprint_is_where_brightness_rises() -> None:
    values = np.random.default_rng(1).integers(0, 256, (8, 9), np.uint8)
    bits = (np.diff(values.astype(int), axis=1) > 0).flatten()
    assert fingerprint(Image.fromarray(values)) == sum(
        1 << i for i in np.flatnonzero(bits).tolist()
    )
    ramp = Image.linear_gradient("L").rotate(90)
    assert appearance_of(ramp.convert("RGB")).fingerprint == 2**64 - 1
    darker = ramp.resize((100, 70)).point(lambda value: value // 2)
    assert fingerprint(darker) == fingerprint(ramp)
