"""``dora-diffusion convert``."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from dora_diffusion.cli.commands.options import (
    add_alpha,
    add_base,
    add_dtype,
    add_json,
    add_limits,
    add_overwrite,
    base_options,
    print_written,
)
from dora_diffusion.cli.console.progress import tell
from dora_diffusion.config import ConfigError
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.files.atomic import atomic_file
from dora_diffusion.formats.layouts import LORA_RANK, PROGRAMS, TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("input", help="An adapter file or folder.")
    parser.add_argument("output", help="The file or folder to write; of peft, a .zip too.")
    parser.add_argument(
        "--to",
        required=True,
        type=_target,
        choices=TARGETS,
        help=f"Program that gets the format it needs of this adapter: {', '.join(PROGRAMS)}. Or a "
        "format: diffusers, peft; kohya, for LyCORIS; for one --base: comfyui, dense (large), and "
        "lora, lora-diffusers, which approximate it without magnitudes; dora: a smaller rank, "
        "nearest with --base.",
    )
    add_base(parser, required=False)
    parser.add_argument(
        "--family", choices=tuple(FAMILIES), help="Model family, for files that do not say it."
    )
    add_limits(
        parser, f"Largest rank, of dora and the lora targets. Default: {LORA_RANK} for lora."
    )
    add_alpha(parser)
    parser.add_argument("--tags", nargs="*", default=[], help="Tags that adapter managers show.")
    parser.add_argument("--thumbnail", help="An image that adapter managers show.")
    add_json(parser)
    add_dtype(parser, "Precision of the low-rank factors. Default: float32.", default=None)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Write an adapter for another tool, and say how exact it is."""
    from dora_diffusion.export import convert_adapter
    from dora_diffusion.models.precision import dtype_of

    output, options = Path(args.output), base_options(args)
    is_packed = args.to == "peft" and output.suffix == ".zip"
    if is_packed and output.exists() and not args.overwrite:
        raise ConfigError(f"{output} exists; choose another output, or --overwrite")
    tell(phase="converting")
    with tempfile.TemporaryDirectory() as scratch:
        report = convert_adapter(
            args.input,
            Path(scratch, output.stem) if is_packed else args.output,
            args.to,
            base=args.base,
            family=args.family,
            alpha=args.alpha,
            tags=args.tags,
            thumbnail=args.thumbnail,
            dtype=dtype_of(args.dtype) if args.dtype else None,
            rank=args.rank,
            conv_rank=args.conv_rank,
            energy=args.energy,
            overwrite=args.overwrite,
            **options,
        )
        if is_packed:
            with atomic_file(output) as temporary:
                packed = shutil.make_archive(f"{scratch}/packed", "zip", report.path)
                shutil.move(packed, temporary)
        print_written(report, output if is_packed else report.path, as_json=args.json)
    return 0


def _target(word: str) -> str:
    """A program or a format, as people write it: ``"SD_Scripts"`` is ``"sd-scripts"``."""
    return word.lower().replace("_", "-")
