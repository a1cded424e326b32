"""``dora-diffusion combine``."""

from __future__ import annotations

import argparse

from dora_diffusion.cli.commands.options import (
    adapter_and_strength,
    add_alpha,
    add_base,
    add_fit,
    add_limits,
    fit_options,
    print_written,
)
from dora_diffusion.cli.console.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="Adapter files or output folders; FILE:0.5 gives one its own strength.",
    )
    add_base(parser)
    parser.add_argument("--output", required=True, help="The file or folder to write.")
    add_limits(parser, "Largest rank. Default: the sum of the adapters' in each layer.")
    add_alpha(parser)
    add_fit(parser, "the adapters' own, output where they differ")


def run(args: argparse.Namespace) -> int:
    """Write one adapter that does what several do together, and say how near it is."""
    from dora_diffusion.export import combine_adapters

    options = fit_options(args)
    with progress("combining", "B") as show:
        report = combine_adapters(
            args.base,
            [adapter_and_strength(text) for text in args.adapters],
            args.output,
            alpha=args.alpha,
            on_progress=show,
            **options,
        )
    print_written(report, as_json=args.json)
    return 0
