"""Training of the judges: an attribute classifier and a contrastive subject embedder."""

from __future__ import annotations

import json
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dora_diffusion.toy.instrument import (
    ATTRIBUTES,
    Classifier,
    Instrument,
    SubjectEmbedder,
)
from dora_diffusion.toy.judges import compose
from dora_diffusion.toy.shapes import UNSEEN_CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, Scene, render
from lab.pretrain.data import (
    CAPTIONED,
    SIZE,
    held_out_scene,
    held_out_sighting,
    open_images,
    to_pixels,
    training_scene,
)
from lab.pretrain.fit import FitSettings, fit
from lab.pretrain.strangers import sample_stranger

NO_NAME = -100
"""The label of what has no name, ignored by the loss: the colour of a random RGB body."""

VIEWS = 3
SUBJECTS = 8_000
VIEWS_SEED = 14
TEMPERATURE = 0.1


def labels_of(scene: Scene) -> list[int]:
    """Indices into `ATTRIBUTES`, `NO_NAME` where the scene has no nameable value."""
    values = (scene.subject.kind, scene.subject.color, scene.subject.pattern, scene.background)
    return [
        choices.index(value) if value in choices else NO_NAME
        for value, choices in zip(values, ATTRIBUTES.values(), strict=True)
    ]


def roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise and now and then blur, since generated images are never as clean as renders."""
    strength = 0.07 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    pixels = pixels + strength * torch.randn(pixels.shape, generator=generator)
    if torch.rand((), generator=generator) < 0.33:
        blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
        return 0.5 * (pixels + blurred)
    return pixels


def train_classifier(folder: Path, minutes: float) -> Classifier:
    """Train on the captioned images."""
    images = open_images(folder)
    labels = torch.tensor([labels_of(training_scene(i)) for i in range(CAPTIONED)])

    def loss(model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, CAPTIONED, (48,), generator=generator)
        pixels = roughened(to_pixels(images[index]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels)
        losses = [
            F.cross_entropy(logit.float(), labels[index, k], ignore_index=NO_NAME)
            for k, logit in enumerate(logits.values())
        ]
        return torch.stack(losses).sum()

    torch.manual_seed(1)
    settings = FitSettings(minutes, learning_rate=2e-3, hold=0.1, weight_decay=0.02, ema_decay=0.99)
    return fit("classifier", folder, Classifier(), loss, settings)


def _render_views(seed: int) -> NDArray[np.uint8]:
    """100 subjects: (100, VIEWS, 64, 64, 3); every kind of shape, named, unseen and nonsense."""
    generator = np.random.default_rng((VIEWS_SEED, seed))
    views = np.empty((100, VIEWS, SIZE, SIZE, 3), np.uint8)
    for row in views:
        draw = generator.random()
        unseen = str(generator.choice(list(UNSEEN_CLASSES)))
        kind = unseen if draw < 0.2 else "random" if draw < 0.35 else None
        subject = sample_stranger(generator, kind)
        places = generator.choice(list(BACKGROUNDS), VIEWS, replace=False)
        for view, background in zip(row, places, strict=True):
            view[:] = render(compose(subject, str(background), generator), SIZE)
    return views


def train_embedder(folder: Path, minutes: float) -> SubjectEmbedder:
    """Train by telling each subject's second view from the other subjects' (InfoNCE)."""
    path = folder / "views.npy"
    if not path.exists():
        with Pool(2) as pool:
            np.save(path, np.concatenate(pool.map(_render_views, range(SUBJECTS // 100))))
    views = torch.from_numpy(np.load(path, mmap_mode="c"))

    def loss(model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(views), (40,), generator=generator)
        pair = torch.rand(len(index), VIEWS, generator=generator).argsort(1)
        pixels = to_pixels(torch.cat([views[index, pair[:, 0]], views[index, pair[:, 1]]]))
        with torch.autocast("cpu", torch.bfloat16):
            vectors = model(roughened(pixels, generator)).float()
        first, second = vectors.chunk(2)
        scores, same = first @ second.T / TEMPERATURE, torch.arange(len(index))
        return 0.5 * (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same))

    torch.manual_seed(2)
    settings = FitSettings(minutes, learning_rate=2e-3, hold=0.1, weight_decay=0.02, ema_decay=0.99)
    return fit("embedder", folder, SubjectEmbedder(), loss, settings)


@torch.no_grad()
def measure_classifier(classifier: Classifier, count: int = 1000) -> dict[str, float]:
    """Accuracy per attribute on held-out renders, and of all attributes together."""
    scenes = [held_out_scene(i) for i in range(count)]
    truth = torch.tensor([labels_of(scene) for scene in scenes])
    pixels = to_pixels(np.stack([render(scene, SIZE) for scene in scenes]))
    logits = classifier(pixels)
    right = torch.stack([v.argmax(1) for v in logits.values()], 1) == truth
    accuracy = dict(zip(logits, right.float().mean(0).tolist(), strict=True))
    return accuracy | {"all": float(right.all(1).float().mean())}


@torch.no_grad()
def measure_embedder(embedder: SubjectEmbedder, count: int = 300) -> dict[str, float]:
    """Cosines of two views of new subjects, of different subjects, and retrieval among them."""
    sightings = [held_out_sighting(i) for i in range(count)]
    first, second = (
        embedder(to_pixels(np.stack([render(s.views[k], SIZE) for s in sightings]))) for k in (0, 1)
    )
    cosines = first @ second.T
    others = cosines[~torch.eye(count, dtype=torch.bool)]
    return {
        "same_subject": float(cosines.diag().mean()),
        "other_subject": float(others.mean()),
        "retrieval": float((cosines.argmax(1) == torch.arange(count)).float().mean()),
    }


def save_instrument(instrument: Instrument, folder: Path) -> None:
    """Write the networks in float16 and what was measured with them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("classifier", "embedder"):
        state = getattr(instrument, name).state_dict()
        halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        file = folder / f"{name}.safetensors"
        save_file(halves, file)
        file.chmod(0o644)  # safetensors writes for its owner alone
    (folder / "measured.json").write_text(
        json.dumps(instrument.measured, indent=2) + "\n", encoding="utf-8"
    )


def train_instrument(folder: Path, minutes: float, output: Path) -> None:
    """Train both networks, half of the time each, and write them with their figures."""
    classifier = train_classifier(folder, minutes / 2)
    embedder = train_embedder(folder, minutes / 2)
    measured = measure_classifier(classifier) | measure_embedder(embedder)
    measured = {name: round(value, 4) for name, value in measured.items()}
    save_instrument(Instrument(classifier, embedder, measured), output)
    print(measured, flush=True)
