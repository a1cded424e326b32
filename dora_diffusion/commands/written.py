"""What the commands that write adapters share: flags, and what they say of what was written."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from typing import TYPE_CHECKING

from dora_diffusion.commands.options import add_dtype, add_overwrite
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.console.programs import where_it_works
from dora_diffusion.console.tables import print_json
from dora_diffusion.formats.layouts import CONVERSIONS
from dora_diffusion.wording import counted

if TYPE_CHECKING:
    from dora_diffusion.export import ConversionReport

# Flags that limit ranks.
LIMITS = ("rank", "conv_rank", "energy")


def add_limits(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """Add what limits the rank of each layer; ``text`` says what ``--rank`` is."""
    parser.add_argument("--rank", type=int, required=required, help=text)
    parser.add_argument(
        "--conv_rank", type=int, help="Largest rank of convolutions. Default: --rank."
    )
    parser.add_argument(
        "--energy",
        type=float,
        help="Take each layer's smallest rank that holds this share of the squared singular "
        "values, such as 0.95. Default: the largest rank.",
    )


def add_fit(parser: argparse.ArgumentParser, axis: str) -> None:
    """Add how an adapter is fitted and written; ``axis`` says the default of ``--norm_axis``."""
    parser.add_argument(
        "--method", choices=("dora", "lora"), default="dora", help="lora: without magnitudes."
    )
    parser.add_argument(
        "--norm_axis",
        choices=NORM_AXES,
        help=f"What the magnitudes run along. Default: {axis}.",
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "peft", "kohya"),
        help="Key format. Default: diffusers; kohya on the input axis, which it alone can hold.",
    )
    add_json(parser)
    add_dtype(parser, "Precision of the low-rank factors. Default: float32.", default=None)
    add_overwrite(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the error of every layer."
    )


def print_written(report: ConversionReport, *, as_json: bool) -> None:
    """Say what was written, how near it is, and which programs read it exactly."""
    from dora_diffusion.export import inspect_adapter

    if as_json:
        print_json(dataclasses.asdict(report))
        return
    layers = counted(report.layers, "layer")
    print(f"{report.path}: {layers}, {CONVERSIONS[report.target].written}")
    if report.worst is not None:
        name, error = report.worst
        print(
            f"relative error of the change: median {report.median_error:.2%}, "
            f"largest {error:.2%} in {name}, in total {report.total_error:.2%}"
        )
    for note in report.notes:
        print(f"note: {note}")
    exact, wrong = where_it_works(inspect_adapter(report.path).tools)
    for line in exact:
        print(line)
    if wrong:
        print(f"wrong: {wrong}; convert it for these, or export a merged model")


def warn_of_axis(args: argparse.Namespace) -> None:
    """Say where ``--norm_axis`` does nothing.

    Warns:
        UserWarning: If so.
    """
    if args.method == "lora" and args.norm_axis is not None:
        warnings.warn("norm_axis has no effect because a LoRA has no magnitudes", stacklevel=2)
