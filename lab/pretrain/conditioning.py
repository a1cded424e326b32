"""Check of SDXL's conditioning: a crop asked for is seen, and so is a size.

True images are rendered as the training's were, so that each figure has its truth beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.toy.instrument import ATTRIBUTES, STUDIO, silhouette
from dora_diffusion.toy.judges import compose, sample_subject
from lab.pretrain.card import generate, prompt_of
from lab.pretrain.data import HELD_OUT, to_pixels
from lab.pretrain.views import SIDE, View, render_view

WIDE = 3 * SIDE // 2
OFFSETS = (0, SIDE // 4, SIDE // 2)
SIZES = (SIDE // 4, SIDE // 2, SIDE)
# The studio is grey, and these would not stand out from it.
_COLORS = tuple(name for name in ATTRIBUTES["color"] if name not in ("white", "black", "brown"))


def measure_conditioning(pipeline: Any, count: int) -> dict[str, tuple[float, float]]:
    """Measure crops and sizes; per question, (what images show, what true renders show)."""
    measured = {}
    for edge, size in (("left", (SIDE, WIDE)), ("top", (WIDE, SIDE))):
        for offset in OFFSETS:
            corner = (0, offset) if edge == "left" else (offset, 0)
            both = _asked(pipeline, size, corner, count), _true(size, corner, count)
            if edge == "top":
                both = both[0].mT, both[1].mT
            measured[f"crop {offset} from the {edge}"] = mean_center(both[0]), mean_center(both[1])
    for side in SIZES:
        images = _asked(pipeline, (side, side), (0, 0), count)
        truth = _true((side, side), (0, 0), count)
        measured[f"size {side}"] = (sharpness(images), sharpness(truth))
    return measured


def _asked(pipeline: Any, size: tuple[int, int], corner: tuple[int, int], count: int) -> Tensor:
    generator = np.random.default_rng((HELD_OUT, 78))
    wishes = [
        {
            "kind": str(generator.choice(ATTRIBUTES["kind"])),
            "color": str(generator.choice(_COLORS)),
            "pattern": "plain",
            "background": STUDIO,
        }
        for _ in range(count)
    ]
    prompts = [prompt_of(wish) for wish in wishes]
    images = generate(
        pipeline,
        prompts,
        original_size=size,
        crops_coords_top_left=corner,
        target_size=(SIDE, SIDE),
    )
    return to_pixels(np.stack([np.asarray(image) for image in images]))


def _true(size: tuple[int, int], corner: tuple[int, int], count: int) -> Tensor:
    generator = np.random.default_rng((HELD_OUT, 79))
    images: list[np.ndarray] = []
    while len(images) < count:
        subject = replace(sample_subject(generator), pattern="plain")
        if subject.color in _COLORS:
            view = View(compose(subject, STUDIO, generator), size, corner)
            images.append(render_view(view))
    return to_pixels(np.stack(images))


def mean_center(pixels: Tensor) -> float:
    """Mean horizontal centre of the objects, -1 (left) to 1; pixels (n, 3, h, w) in [-1, 1]."""
    found = [silhouette((image + 1) / 2) for image in pixels]
    return float(np.mean([shape.center for shape in found if shape is not None]))


def sharpness(pixels: Tensor) -> float:
    """Mean difference of neighbouring pixels, in 255ths; pixels (n, 3, h, w) in [-1, 1]."""
    across, down = pixels.diff(dim=-1).abs().mean(), pixels.diff(dim=-2).abs().mean()
    return float(127.5 * torch.stack([across, down]).mean())
