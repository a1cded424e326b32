"""``dora-diffusion compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.console.tables import print_json
from dora_diffusion.cli.settings import CompareSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from dora_diffusion.lab.study.config import Study

QUICK: dict[str, Any] = {
    "base": "embedded:tiny-sd",
    "methods": {
        "dora": {},
        "lora": {"method": "lora"},
        "full": {"method": "full", "full_weights": "targets", "learning_rate": 8e-4},
    },
    "subjects": ["star_teapot"],
    "seeds": 1,
    "common": {
        "learning_rate": 4e-3,
        "rank": 8,
        "conv_rank": 8,
        "train_batch_size": 5,
        "max_train_steps": 30,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
    },
    "asked": {"inference_steps": 10, "analysis_points": 2},
}
"""A study of two minutes: too short to say anything of the methods."""


SETTINGS = CompareSettings


def run(args: CompareSettings) -> int:
    """Perform the trials that have no record yet, and write the report."""
    study, share = _study(args), args.share
    import warnings

    from dora_diffusion.lab.study.report import caution, figures_table, write_report
    from dora_diffusion.lab.study.run import run_study

    for reason in study.reasons():
        warnings.warn(reason, stacklevel=1)
    output = Path(args.output)
    require_writable(output, is_folder=True)
    with progress("training and measuring", "trial") as show:
        results = run_study(
            study,
            output,
            lambda done, total, record, known: show(done, total),
            only_known=args.report_only,
            address=args.address,
            share=share,
        )
    if not results.records:
        raise ConfigError(f"{output} contains no record of this study; leave out --report_only")
    files = write_report(results, output)
    if doubt := caution(results.records):
        warnings.warn(doubt, stacklevel=1)
    if args.json:
        print_json([*results.tuning, *results.records])
        return 0
    from dora_diffusion.config.wording import aligned

    print(aligned(figures_table(results.records)))
    print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
    return 0


def _study(args: CompareSettings) -> Study:
    """The study that was asked for.

    Raises:
        ConfigError: If it is not one of a file and the quick one.
    """
    from dora_diffusion.lab.study.config import Study, read_study

    if bool(args.study) == args.quick:
        raise ConfigError("give a study's YAML file, or --quick")
    return Study.from_dict(QUICK) if args.quick else read_study(args.study or "")
