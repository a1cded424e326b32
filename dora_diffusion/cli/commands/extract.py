"""``dora-diffusion extract``."""

from __future__ import annotations

import argparse

from dora_diffusion.cli.commands.options import (
    add_base,
    add_fit,
    add_limits,
    base_options,
    fit_options,
    print_written,
)
from dora_diffusion.cli.console.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_base(parser)
    parser.add_argument(
        "--tuned",
        required=True,
        help="The fine-tuned model, of the same architecture: a Diffusers "
        "folder, hub id or single .safetensors file.",
    )
    parser.add_argument("--tuned_variant", help="Weight variant of --tuned, such as fp16.")
    parser.add_argument("--tuned_revision", help="Branch, tag or commit of --tuned on the hub.")
    parser.add_argument("--output", required=True, help="The file or folder to write.")
    add_limits(parser, "Largest rank; small layers get less.", required=True)
    add_fit(parser, "output")


def run(args: argparse.Namespace) -> int:
    """Write the adapter that is nearest to a tuned model, and say how near."""
    from dora_diffusion.export import extract_adapter

    options = fit_options(args) | base_options(args, "tuned")
    options["norm_axis"] = args.norm_axis or "output"
    with progress("extracting", "B") as show:
        report = extract_adapter(args.base, args.tuned, args.output, on_progress=show, **options)
    print_written(report, as_json=args.json)
    return 0
