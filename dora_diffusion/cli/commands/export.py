"""``dora-diffusion export``."""

from __future__ import annotations

import argparse

from dora_diffusion.cli.commands.options import (
    adapter_and_strength,
    add_dtype,
    add_merge,
    add_overwrite,
    merge_options,
    warn_without_effect,
)
from dora_diffusion.cli.console.progress import progress
from dora_diffusion.config.fields import AUTO


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_merge(parser, required=False)
    parser.add_argument(
        "--output",
        required=True,
        help="X.safetensors for one file that web UIs read; else a Diffusers folder.",
    )
    add_dtype(parser, "Precision of the result. auto: the base's own, whatever machine merges it.")
    parser.add_argument(
        "--config",
        help="Diffusers folder with the configuration, for a folder made from a single file. "
        "Default: the released model's.",
    )
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Write a base, with adapters merged in, check it, and say which programs read it rightly."""
    from dora_diffusion.export import export_checkpoint, inspect_model
    from dora_diffusion.models.precision import dtype_of

    warn_without_effect(args)
    with progress("merging", "B") as show:
        path = export_checkpoint(
            args.base,
            [adapter_and_strength(text) for text in args.adapter],
            args.output,
            dtype=None if args.dtype == AUTO else dtype_of(args.dtype),
            config=args.config,
            overwrite=args.overwrite,
            on_progress=show,
            **merge_options(args),
        )
    print(f"{path} (reopened and checked)")
    report, programs = inspect_model(path), dict[str, list[str]]()
    for program, verdict in report.tools.items():
        programs.setdefault("not known" if verdict == "-" else verdict, []).append(program)
    for verdict, names in programs.items():
        print(f"{', '.join(names)}: {verdict}")
    for note in report.notes:
        print(f"note: {note}")
    return 0
