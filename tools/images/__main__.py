"""Drawing of the images of ``docs/images``: ``python -m tools.images`` or with some names.

    python -m tools.images                       # all of them; about 20 minutes on two cores
    python -m tools.images house walk            # seconds
    python -m tools.images app --steps 8 --output /tmp/look   # the app's layout alone

Trainings are kept in ``--work`` and continue there if the command is stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Image -> the module that draws it.
IMAGES = {
    "house": "house",
    "walk": "walk",
    "dora": "directions",
    "rank": "grids",
    "strength": "grids",
    "steps": "grids",
    "no-prior": "grids",
    "bad-token": "grids",
    "app": "app",
}


def main() -> None:
    """Make the images that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.images", description="Make the images of docs/images again."
    )
    known = ", ".join(IMAGES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {known}. Default: all.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="Where to.")
    parser.add_argument(
        "--work", type=Path, default=Path("images-work"), help="Where trainings are kept."
    )
    parser.add_argument("--steps", type=int, help="Training steps. Default: each image's own.")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in IMAGES]:
        parser.error(f"there is no image {unknown[0]!r}; it must be one of {known}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names or IMAGES:
        module = import_module(f"tools.images.{IMAGES[name]}")
        draw: Callable[..., list[Path]] = module.draw
        for file in draw(name, args.output, args.work, args.steps):
            print(f"{file}: {file.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
