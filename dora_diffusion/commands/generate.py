"""``dora-diffusion generate``."""

from __future__ import annotations

import argparse
import secrets
import warnings
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError


def run(args: argparse.Namespace) -> int:
    """Make pictures and write them with what made them."""
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise ConfigError(f"output {args.output} must end in .png")
    if args.num_images < 1 or args.batch_size < 1:
        raise ConfigError("num_images and batch_size must be at least 1")
    from dora_diffusion.generate import SamplingSettings, generate_images
    from dora_diffusion.pictures import parameters_text, save_png

    settings = SamplingSettings(
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        scheduler=args.scheduler,
        width=args.width,
        height=args.height,
        negative_prompt=args.negative_prompt,
    )
    components = _load(args)
    first = secrets.randbelow(2**31) if args.seed is None else args.seed
    seeds = [first + i for i in range(args.num_images)]
    images = generate_images(components, args.prompt, seeds, settings, batch_size=args.batch_size)
    for seed, image in zip(seeds, images, strict=True):
        path = output if len(seeds) == 1 else output.with_stem(f"{output.stem}-{seed}")
        text = parameters_text(
            args.prompt, seed, settings, image.size, args.base, args.adapter, args.strength
        )
        save_png(image, path, text)
        print(f"{path} (seed {seed})")
    return 0


def _load(args: argparse.Namespace) -> Any:
    """The base model on the best device, with the adapter on it."""
    import torch

    from dora_diffusion.adapters.files import load_adapter
    from dora_diffusion.adapters.inject import layer_adapters, set_strength
    from dora_diffusion.data.captions import contains_token
    from dora_diffusion.models.load import load_components

    device = "cuda" if torch.cuda.is_available() else "cpu"
    components = load_components(args.base, dtype=getattr(torch, args.dtype)).to(device)
    if args.adapter is None:
        return components
    metadata = load_adapter(components.adaptable(), args.adapter)
    for model in components.adaptable().values():
        if any(layer_adapters(model)):
            set_strength(
                model,
                args.strength,
                direction=args.direction_strength,
                magnitude=args.magnitude_strength,
            )
    token = metadata.trigger.partition(" ")[0]
    if token and not contains_token(args.prompt, token):
        warnings.warn(
            f"the prompt lacks the adapter's trigger word; write {metadata.trigger!r} to get the "
            "subject",
            stacklevel=1,
        )
    return components
