"""The sample subjects, three objects the embedded models never saw, and their photos.

``python -m dora_diffusion.toy.samples`` renders them again. The photos show five backgrounds;
the other five are held out for evaluation.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dora_diffusion.toy.backgrounds import BACKGROUNDS
from dora_diffusion.toy.captions import PLACES
from dora_diffusion.toy.world import DrawnSubject, Emblem, Scene, render

TRIGGER = "sks"
PHOTO_BACKGROUNDS = ("grass", "sand", "wood", "studio", "forest")
NEW_BACKGROUNDS = tuple(name for name in BACKGROUNDS if name not in PHOTO_BACKGROUNDS)


@dataclass(frozen=True)
class SampleSubject:
    """A subject with its folder's name and the class word that prompts use."""

    name: str
    class_word: str
    subject: DrawnSubject

    def prompt(self, background: str, variant: int = 0) -> str:
        """``a photo of a sks mug on the grass``."""
        place = PLACES[background][variant]
        return f"a photo of a {TRIGGER} {self.class_word} {place}"

    def scene(self, background: str, seed: int) -> Scene:
        """A view of the subject in a place; it never mirrors, since a lightning bolt would not."""
        generator = np.random.default_rng((zlib.crc32(self.name.encode()), seed))
        return Scene(
            subject=self.subject,
            background=background,
            size=float(generator.uniform(0.64, 0.82)),
            position=(
                float(generator.uniform(-0.16, 0.16)),
                float(generator.uniform(-0.2, 0)),
            ),
            rotation=float(generator.uniform(-0.1, 0.1)),
            light=float(generator.uniform(0.9, 2.2)),
            seed=seed,
        )


BOLT_MUG = SampleSubject(
    "bolt_mug",
    "mug",
    DrawnSubject(
        kind="mug",
        body=(0.05, 0.50, 0.52),
        accent=(0.95, 0.42, 0.30),
        emblem=Emblem("bolt", (0.99, 0.88, 0.22)),
    ),
)
HEART_TEAPOT = SampleSubject(
    "heart_teapot",
    "teapot",
    DrawnSubject(
        kind="teapot",
        body=(0.33, 0.10, 0.38),
        accent=(0.90, 0.70, 0.18),
        emblem=Emblem("heart", (0.99, 0.60, 0.70)),
    ),
)
RING_ROBOT = SampleSubject(
    "ring_robot",
    "toy",
    DrawnSubject(
        kind="robot",
        body=(0.55, 0.80, 0.62),
        accent=(0.72, 0.20, 0.45),
        emblem=Emblem("ring", (0.20, 0.22, 0.55)),
    ),
)
SAMPLE_SUBJECTS: dict[str, SampleSubject] = {
    sample.name: sample for sample in (BOLT_MUG, HEART_TEAPOT, RING_ROBOT)
}


def write_photos(sample: SampleSubject, folder: Path) -> list[Path]:
    """Render a subject's five photos and caption files into a folder; returns the photos."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for number, background in enumerate(PHOTO_BACKGROUNDS, start=1):
        size = (768, 768) if number % 2 else (768, 640)
        photo = folder / f"{number:02d}.jpg"
        image = render(sample.scene(background, number), size)
        Image.fromarray(image).save(photo, quality=90)
        photo.with_suffix(".txt").write_text(sample.prompt(background) + "\n", encoding="utf-8")
        photos.append(photo)
    return photos


def main() -> None:
    """Render all samples."""
    parser = argparse.ArgumentParser(description="Render the sample subjects' photos.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("samples"))
    folder = parser.parse_args().folder
    for sample in SAMPLE_SUBJECTS.values():
        print(f"{sample.name}: {len(write_photos(sample, folder / sample.name))} photos")


if __name__ == "__main__":
    main()
