"""``dora-diffusion extract``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.cli.console.programs import print_written
from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.settings import Fit, OfModel, magnitudes
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Fit):
    """Settings of ``extract``."""

    tuned: str = flag(
        REQUIRED,
        "The fine-tuned model, of the same architecture: a Diffusers folder, hub id or single "
        ".safetensors file.",
    )
    tuned_variant: str | None = flag(
        None,
        "Weight variant of --tuned, such as fp16.",
        needs=(OfModel("tuned", "tuned model"),),
    )
    tuned_revision: str | None = flag(
        None,
        "Branch, tag or commit of --tuned on the hub.",
        needs=(OfModel("tuned", "tuned model", of_hub=True),),
    )
    rank: int = flag(REQUIRED, "Largest rank; small layers get less.")
    norm_axis: str | None = flag(
        None,
        "Axis of the magnitudes. Default: output.",
        choices=NORM_AXES,
        needs=(magnitudes,),
    )


SETTINGS = ExtractSettings


def run(args: ExtractSettings) -> int:
    """Write the adapter that is nearest to a tuned model, and say how near."""
    from dora_diffusion.export import extract_adapter

    tuned = BaseModel(args.tuned, args.tuned_variant, args.tuned_revision)
    options = args.fit_options | {"norm_axis": args.norm_axis or "output"}
    with progress("extracting", "B") as show:
        report = extract_adapter(args.base_model, tuned, args.output, on_progress=show, **options)
    print_written(report, as_json=args.json)
    return 0
