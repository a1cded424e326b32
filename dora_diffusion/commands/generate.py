"""``dora-diffusion generate``."""

from __future__ import annotations

import argparse
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.commands.effect import check_sampling, warn_without_effect
from dora_diffusion.config import ConfigError
from dora_diffusion.console.progress import step_progress


def run(args: argparse.Namespace) -> int:
    """Make pictures and write them with what made them."""
    seeds = _seeds(args)
    _check(args, seeds)
    warn_without_effect(args)
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
        alpha=args.alpha,
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
    with step_progress() as show:
        images = generate_images(
            components,
            args.prompt,
            seeds,
            settings,
            batch_size=args.batch_size,
            on_step=show,
            require_finite=True,
        )
    _save(args, settings, seeds, images)
    return 0


def _check(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Refuse what could not be sampled or written before a model is loaded."""
    if Path(args.output).suffix.lower() != ".png":
        raise ConfigError(f"output {args.output} must end in .png")
    existing = [path for path in _paths(args, seeds) if path.exists()]
    if existing and not args.overwrite:
        raise ConfigError(
            f"{existing[0]} exists; choose another --output, or replace it with --overwrite"
        )
    for name in ("num_images", "batch_size", "steps", "width", "height"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    check_sampling(args)


def _seeds(args: argparse.Namespace) -> list[int]:
    """Consecutive seeds, from a random one where none is given.

    Raises:
        ConfigError: If torch cannot take one of them.
    """
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - max(1, args.num_images):
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images")
    return [first + i for i in range(args.num_images)]


def _paths(args: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """One image gets the name that was asked for; several get their seed behind it."""
    output = Path(args.output)
    if len(seeds) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{seed}") for seed in seeds]


def _save(args: argparse.Namespace, settings: Any, seeds: list[int], images: list[Any]) -> None:
    """Write the images with what made them."""
    from dora_diffusion.images import parameters_text, save_png
    from dora_diffusion.numerics.weights import Strengths

    for seed, path, image in zip(seeds, _paths(args, seeds), images, strict=True):
        text = parameters_text(
            args.prompt,
            seed,
            settings,
            image.size,
            args.base,
            args.adapter,
            Strengths(args.strength, args.direction_strength, args.magnitude_strength),
        )
        save_png(image, path, text)
        print(f"{path} (seed {seed})")
