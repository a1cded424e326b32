"""``dora-diffusion generate``."""

from __future__ import annotations

import argparse
import secrets
import warnings
from pathlib import Path

from dora_diffusion.commands.options import (
    add_adapted_model,
    add_base,
    add_overwrite,
    add_sampling,
    load_adapted_model,
    require_at_least_one,
)
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import require
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.console.progress import progress
from dora_diffusion.formats.files.atomic import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_base(parser)
    parser.add_argument("--adapter", help="An adapter file, or the output folder of a run.")
    parser.add_argument("--prompt", required=True, help="Prompt.")
    parser.add_argument("--output", required=True, help="Image file, X.png.")
    parser.add_argument(
        "--image", help="Of an inpainting model: image to paint into, cut to the size."
    )
    parser.add_argument(
        "--mask_image", "--mask", help="Image of the same size as --image, white where to paint."
    )
    parser.add_argument("--negative_prompt", default="", help="Negative prompt.")
    parser.add_argument("--seed", type=int, help="Seed of the first image. Default: random, shown.")
    parser.add_argument("--num_images", type=int, default=1, help="Number of images, one per seed.")
    # With the settings of a run's samples, so that a seed gives the sample's image again.
    add_sampling(parser, batch_size=4)
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=SampleSettings.validation_guidance_scale,
        help="Guidance scale (CFG scale).",
    )
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="Guidance rescale, against overexposed images of models with zero terminal SNR: 0.7 "
        "in arXiv:2305.08891. Default: 0, none.",
    )
    parser.add_argument("--width", type=int, help="Width in pixels. Default: the model's own.")
    parser.add_argument("--height", type=int, help="Height in pixels. Default: the model's own.")
    parser.add_argument(
        "--offload",
        choices=("none", "model"),
        default="none",
        help="Offloading to the machine's memory. model: each part of the model is on the GPU only "
        "while it computes, which takes less of its memory and more time. Default: none.",
    )
    add_overwrite(parser)
    add_adapted_model(parser)


def run(args: argparse.Namespace) -> int:
    """Generate images, and write them with what made them."""
    require_at_least_one(args, "num_images", "batch_size")
    files = _files(args)
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.generate import SamplingSettings, generate_images, lacks_trigger
    from dora_diffusion.images import parameters_text, save_png
    from dora_diffusion.numerics.weights import Strengths

    settings = SamplingSettings(
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
        scheduler=args.scheduler,
        width=args.width,
        height=args.height,
        negative_prompt=args.negative_prompt,
        image=None if args.image is None else open_photo(args.image),
        mask_image=None if args.mask_image is None else open_photo(args.mask_image),
    )
    components, metadata = load_adapted_model(args)
    lacking = [name for name in components.family.image_arguments if getattr(args, name) is None]
    require(
        not lacking,
        f"{args.base} is an inpainting model: give --image, and --mask_image of the same size, "
        "white where to paint (all white to paint the whole image)",
    )
    if lacks_trigger(args.prompt, metadata):
        warnings.warn(
            "the prompt lacks the adapter's trigger word; write "
            f"{metadata.trigger!r} to get the subject",
            stacklevel=1,
        )
    with progress("generating images", "step") as show:
        images = generate_images(
            components,
            args.prompt,
            list(files),
            settings,
            batch_size=args.batch_size,
            on_step=show,
            require_finite=True,
        )
    strengths = Strengths(args.strength, args.direction_strength, args.magnitude_strength)
    for (seed, path), image in zip(files.items(), images, strict=True):
        text = parameters_text(
            args.prompt, seed, settings, image.size, args.base, args.adapter, strengths
        )
        save_png(image, path, text)
        print(f"{path} (seed {seed})")
    return 0


def _files(args: argparse.Namespace) -> dict[int, Path]:
    """Seed -> file: one image gets the name that was asked for, several their seed behind it.

    The seeds are consecutive, from a random one where none is given.

    Raises:
        ConfigError: If torch cannot take one of the seeds, or a file cannot be written.
    """
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise ConfigError(f"output {output} must end in .png")
    first = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= first <= 2**63 - args.num_images:
        raise ConfigError(f"seed is {first}; it must be between 0 and 2**63 - num_images")
    seeds = range(first, first + args.num_images)
    files = {seed: output.with_stem(f"{output.stem}-{seed}") for seed in seeds}
    files = files if len(files) > 1 else {first: output}
    existing = next((path for path in files.values() if path.exists()), None)
    if existing and not args.overwrite:
        raise ConfigError(
            f"{existing} exists; choose another --output, or replace it with --overwrite"
        )
    for path in files.values():
        require_writable(path)
    return files
