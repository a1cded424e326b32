"""``dora-diffusion analyze``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from dora_diffusion.cli.commands.options import add_alpha, add_base, base_options
from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.files.atomic import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "source",
        nargs="+",
        help="Output folder of a run (all its checkpoints), an adapter, or a model that was "
        "trained from the base or merged; several are compared.",
    )
    add_base(parser)
    parser.add_argument(
        "--norm_axis",
        choices=("output", "input"),
        default="output",
        help="Axis of a weight's channels, whatever an adapter's own axis is.",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="Layers by patterns of their names, such as '*.to_q'; * spans dots. Default: all.",
    )
    parser.add_argument(
        "--title", nargs="+", default=[], help="Titles of the sources. Default: their names."
    )
    parser.add_argument("--output", default="analysis", help="Folder of the results.")
    parser.add_argument("--overwrite", action="store_true", help="Replace results that exist.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    add_alpha(parser)


def run(args: argparse.Namespace) -> int:
    """Take weights apart; print tables or JSON, and write both with CSV and plots."""
    from dora_diffusion.lab.analysis import Analysis, analyze_weights
    from dora_diffusion.lab.analysis.plots import write_plots

    output = Path(args.output)
    require_writable(output, is_folder=True)
    if Analysis.exists(output) and not args.overwrite:
        raise ConfigError(
            f"{args.output} contains an analysis already; choose another --output, or --overwrite"
        )
    if args.title and len(args.title) != len(args.source):
        raise ConfigError(f"{len(args.title)} titles of {len(args.source)} sources; give one each")
    options = base_options(args)
    with progress("comparing weights", "layer") as show:
        analysis = analyze_weights(
            args.source,
            args.base,
            norm_axis=args.norm_axis,
            layers=args.layers,
            alpha=args.alpha,
            on_progress=show,
            **options,
        )
    if args.title:
        runs = zip(analysis.runs, args.title, strict=True)
        named = [dataclasses.replace(change, name=title) for change, title in runs]
        analysis = dataclasses.replace(analysis, runs=named)
    files = analysis.write(output) | write_plots(analysis, output)
    if args.json:
        print_json(analysis.to_dict())
    else:
        print(analysis.table())
        print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
    return 0
