"""Render the photos of the sample subjects again: ``python -m tools.samples samples``."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from dora_diffusion.toy.benchmark_subjects import (
    SAMPLE_BACKGROUNDS,
    SAMPLE_SUBJECTS,
    SampleSubject,
)
from dora_diffusion.toy.world import render


def write_photos(sample: SampleSubject, folder: Path) -> list[Path]:
    """Render a subject's five photos and caption files into a folder; returns the photos."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for number, background in enumerate(SAMPLE_BACKGROUNDS, start=1):
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
