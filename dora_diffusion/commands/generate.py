"""``dora-diffusion generate``."""

from __future__ import annotations

import argparse
import secrets
import warnings
from pathlib import Path
from typing import Any

from dora_diffusion.commands.progress import step_progress
from dora_diffusion.config import ConfigError


def run(args: argparse.Namespace) -> int:
    """Make pictures and write them with what made them."""
    _check(args)
    from dora_diffusion.generate import (
        SamplingSettings,
        generate_images,
        lacks_trigger,
        load_adapted,
    )
    from dora_diffusion.models.precision import dtype_of

    settings = SamplingSettings(
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        width=args.width,
        height=args.height,
        negative_prompt=args.negative_prompt,
    )
    components, metadata = load_adapted(
        args.base,
        args.adapter,
        strength=args.strength,
        direction=args.direction_strength,
        magnitude=args.magnitude_strength,
        dtype=dtype_of(args.dtype),
        variant=args.variant,
        config=args.config,
    )
    if lacks_trigger(args.prompt, metadata):
        warnings.warn(
            "the prompt lacks the adapter's trigger word; write "
            f"{metadata.trigger!r} to get the subject",
            stacklevel=1,
        )
    seeds = _seeds(args)
    with step_progress() as show:
        images = generate_images(
            components, args.prompt, seeds, settings, batch_size=args.batch_size, on_step=show
        )
    _save(args, settings, seeds, images)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what could not be written before a model is loaded."""
    if Path(args.output).suffix.lower() != ".png":
        raise ConfigError(f"output {args.output} must end in .png")
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ConfigError(f"seed is {args.seed}; it must be between 0 and 2**63 - 1")


def _seeds(args: argparse.Namespace) -> list[int]:
    """Consecutive seeds, from a random one where none is given."""
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    return [first + i for i in range(args.num_images)]


def _save(args: argparse.Namespace, settings: Any, seeds: list[int], images: list[Any]) -> None:
    """One picture gets the name that was asked for; several get their seed behind it."""
    from dora_diffusion.pictures import parameters_text, save_png

    output = Path(args.output)
    for seed, image in zip(seeds, images, strict=True):
        path = output if len(seeds) == 1 else output.with_stem(f"{output.stem}-{seed}")
        text = parameters_text(
            args.prompt,
            seed,
            settings,
            image.size,
            args.base,
            args.adapter,
            args.strength,
            args.direction_strength,
            args.magnitude_strength,
        )
        save_png(image, path, text)
        print(f"{path} (seed {seed})")
