"""``dora-diffusion analyze``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.cli.settings import AnalyzeSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.files.atomic import require_writable

SETTINGS = AnalyzeSettings


def run(args: AnalyzeSettings) -> int:
    """Decompose weights; print tables or JSON, and write both with CSV and plots."""
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
    axis: Any = args.norm_axis
    with progress("comparing weights", "layer") as show:
        analysis = analyze_weights(
            args.source,
            args.base_model,
            norm_axis=axis,
            layers=args.layers,
            alpha=args.alpha,
            on_progress=show,
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
