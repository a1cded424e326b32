"""Small Stable Diffusion models that come with the package, and its sample subjects.

They are pretrained, in the hour that two CPU cores need, on rendered images with true captions,
so that training and export can be tried and tested without a download or a GPU.
"""

from __future__ import annotations

from pathlib import Path

MODELS = ("tiny-sd", "tiny-sdxl")
CLASSES = (
    *("ball", "cube", "mug", "teapot", "bottle", "star", "heart", "tree", "mushroom", "car"),
    *("house", "fish"),
)
FILLERS = ("toy", "object", "thing")
"""Nouns of the captions that they were pretrained on: classes, and words for any of them."""


def model_folder(name: str) -> Path:
    """The folder of an embedded model, an ordinary diffusers pipeline.

    Raises:
        ValueError: no embedded model has that name.
    """
    if name not in MODELS:
        raise ValueError(f"choose {' or '.join(MODELS)}, not {name!r}")
    return Path(__file__).parent / name


def samples_folder() -> Path:
    """Return the folder of the sample subjects, with photos, captions and settings.

    In a wheel the folder is inside the package, in a clone next to it.
    """
    package = Path(__file__).parents[2]
    return next(
        (path for path in (package / "samples", package.parent / "samples") if path.is_dir()),
        Path("samples"),
    )
