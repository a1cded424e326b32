"""``dora-diffusion combine``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.cli.console.programs import print_written
from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.settings import Alpha, Fit, adapter_and_strength
from dora_diffusion.config.fields import REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class CombineSettings(Alpha, Fit):
    """Settings of ``combine``."""

    adapters: list[str] = flag(
        REQUIRED,
        "Adapter files or output folders; FILE:0.5 gives one its own strength.",
        positional=True,
        metavar="ADAPTER",
    )


SETTINGS = CombineSettings


def run(args: CombineSettings) -> int:
    """Write one adapter that does what several do together, and say how near it is."""
    from dora_diffusion.export import combine_adapters

    with progress("combining", "B") as show:
        report = combine_adapters(
            args.base_model,
            [adapter_and_strength(text) for text in args.adapters],
            args.output,
            alpha=args.alpha,
            on_progress=show,
            **args.fit_options,
        )
    print_written(report, as_json=args.json)
    return 0
