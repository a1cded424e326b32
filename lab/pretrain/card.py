"""Measures of the finished model, its example grid and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.toy.instrument import ATTRIBUTES, Instrument
from dora_diffusion.toy.world import PLACES, render
from lab.pretrain.data import (
    HELD_OUT,
    SIZE,
    held_out_sighting,
    to_images,
    to_pixels,
)
from lab.pretrain.vae import held_out_subject_images, psnr, round_trip

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS, GUIDANCE = 25, 5.0


def random_wishes(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Random combinations of class, colour, pattern and background."""
    generator = np.random.default_rng((HELD_OUT, 77, seed))
    return [
        {name: str(generator.choice(choices)) for name, choices in ATTRIBUTES.items()}
        for _ in range(count)
    ]


def prompt_of(wish: dict[str, str]) -> str:
    """``a photo of a red striped mug on the grass``."""
    pattern = "" if wish["pattern"] == "plain" else wish["pattern"] + " "
    place = PLACES[wish["background"]][0]
    return f"a photo of a {wish['color']} {pattern}{wish['kind']} {place}"


def generate(
    pipeline: Any, prompts: list[str], seed: int = 0, batch: int = 25, **conditioning: Any
) -> list[Image]:
    """Images for prompts, the n-th from noise that depends on ``seed`` and n alone.

    ``conditioning`` is passed on: the sizes and crops that SDXL's pipeline takes, and whatever
    replaces the steps and the guidance.
    """
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | conditioning
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [
            torch.Generator().manual_seed(100_000 * seed + start + k) for k in range(len(part))
        ]
        images += pipeline(part, generator=noise, **options).images
    return images


def for_judges(pixels: Tensor) -> Tensor:
    """Scale images down to what the judges have seen, by means of blocks: (n, 3, 64, 64)."""
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="area")


@torch.no_grad()
def measure_prompts(
    pipeline: Any, instrument: Instrument, count: int, **conditioning: Any
) -> dict[str, float]:
    """Accuracy of generated images in the classifier's eyes."""
    wishes = random_wishes(count)
    images = generate(pipeline, [prompt_of(wish) for wish in wishes], **conditioning)
    pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
    logits = instrument.classifier(for_judges(pixels))
    right = torch.stack(
        [
            logits[name].argmax(1) == torch.tensor([choices.index(wish[name]) for wish in wishes])
            for name, choices in ATTRIBUTES.items()
        ],
        1,
    ).float()
    accuracy = dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True))
    return accuracy | {"all": float(right.all(1).float().mean())}


@torch.no_grad()
def measure_vae(vae: Any, instrument: Instrument, count: int = 200) -> dict[str, float]:
    """Measure the autoencoder's round trip on new subjects.

    "psnr" in dB; "identity": cosine of round trips to *another* real image of the subject, whose
    ceiling without a round trip is "identity_ceiling"; "self": to the image itself.
    """
    side = vae.config.sample_size
    images = held_out_subject_images(count, side)
    others = np.stack([render(held_out_sighting(i).views[1], side) for i in range(count)])
    pixels = to_pixels(images)
    # Through bytes, as every generated image goes.
    rebuilt = to_pixels(to_images(round_trip(vae, pixels)))
    real, other, back = (
        instrument.embedder(for_judges(p)) for p in (pixels, to_pixels(others), rebuilt)
    )
    return {
        "psnr": psnr(vae, images),
        "identity": float((back * other).sum(1).mean()),
        "identity_ceiling": float((real * other).sum(1).mean()),
        "self": float((back * real).sum(1).mean()),
    }


def write_grid(images: list[Image], path: Path, columns: int = 10) -> None:
    """Join equally large images into one, row by row."""
    arrays = [np.asarray(image) for image in images[: len(images) // columns * columns]]
    rows = [np.concatenate(arrays[k : k + columns], 1) for k in range(0, len(arrays), columns)]
    from PIL import Image

    Image.fromarray(np.concatenate(rows)).save(path, quality=90)
