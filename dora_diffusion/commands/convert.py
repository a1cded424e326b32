"""``dora-diffusion convert``."""

from __future__ import annotations

import argparse
import dataclasses
import warnings

from dora_diffusion.commands.options import add_alpha, add_base, add_dtype, add_overwrite
from dora_diffusion.console.programs import where_it_works
from dora_diffusion.console.tables import print_json
from dora_diffusion.families import FAMILIES
from dora_diffusion.formats.adapter.conversions import CONVERSIONS
from dora_diffusion.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("input", help="An adapter file or folder.")
    parser.add_argument("output", help="The file or folder to write.")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(CONVERSIONS),
        help="Target format. diffusers, peft; kohya: for LyCORIS, and for web UIs where trained on "
        "the input axis; for one --base: comfyui (and Forge), dense (A1111 too; large), and lora, "
        "lora-diffusers, which approximate it without magnitudes.",
    )
    add_base(parser, required=False)
    parser.add_argument(
        "--family", choices=tuple(FAMILIES), help="Model family, for files that do not say it."
    )
    parser.add_argument("--rank", type=int, help="Rank of the lora targets. Default: 64.")
    add_alpha(parser)
    parser.add_argument("--tags", nargs="*", default=[], help="Tags that adapter managers show.")
    parser.add_argument("--thumbnail", help="An image that adapter managers show.")
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with the error of every layer."
    )
    add_dtype(parser, "Precision of the low-rank factors. Default: float32.", default=None)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Write an adapter for another tool, and say how exact it is."""
    from dora_diffusion.export import convert_adapter, inspect_adapter
    from dora_diffusion.models.precision import dtype_of

    options = {} if args.rank is None else {"rank": args.rank}
    if options and not CONVERSIONS[args.to].plain_lora_in:
        warnings.warn(
            f"rank has no effect because {args.to} files keep the adapter's; --to lora takes one",
            stacklevel=1,
        )
    report = convert_adapter(
        args.input,
        args.output,
        args.to,
        base=args.base,
        family=args.family,
        alpha=args.alpha,
        tags=args.tags,
        thumbnail=args.thumbnail,
        dtype=dtype_of(args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
        **options,
    )
    if args.json:
        print_json(dataclasses.asdict(report))
        return 0
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
        print(f"wrong: {wrong}; choose another --to for these, or export a merged model")
    return 0
