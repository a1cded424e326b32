"""Commands of the lab: ``analyze``, ``compare``."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import print_json, progress
from dora_diffusion.cli.settings import Alpha, RequiredBase, check_results
from dora_diffusion.cluster.fleet.connection import WorkerSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.wording import aligned
from dora_diffusion.formats.files.atomic import require_writable

if TYPE_CHECKING:
    from lab.study.config import Study

QUICK = Path(__file__).with_name("study") / "quick.yaml"


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings(Alpha, RequiredBase):
    """Settings of ``analyze``."""

    source: list[str] = flag(
        REQUIRED,
        "Output folder of a run (all its checkpoints), an adapter, or a model that was trained "
        "from the base or merged; several are compared.",
        positional=True,
    )
    norm_axis: str = flag(
        "output",
        "Axis of a weight's channels, regardless of the axis of an adapter.",
        choices=NORM_AXES,
    )
    layers: list[str] = flag(
        ["*"],
        "Patterns of layer names, such as '*.to_q'; * also matches dots. Default: all.",
        metavar="PATTERN",
    )
    title: list[str] = flag([], "Titles of the sources. Default: their names.")
    output: str = flag("analysis", "Folder of the results.")
    overwrite: bool = flag(False, "Replace existing results.")
    json: bool = flag(False, "Print JSON instead of tables.")

    def perform(self) -> int:
        """Analyze weights; print tables or JSON, and write both with CSV and plots."""
        from lab.analysis import analyze_weights
        from lab.analysis.plots import write_plots
        from lab.analysis.report import FILES

        output, titles = Path(self.output), len(self.title)
        check_results(output, "an analysis", FILES.values(), overwrite=self.overwrite)
        if titles not in (0, len(self.source)):
            raise ConfigError(
                f"{titles} titles for {len(self.source)} sources; give one for each", "title"
            )
        axis: Any = self.norm_axis
        with progress("comparing weights", "layer") as show:
            analysis = analyze_weights(
                self.source,
                self.base_model,
                norm_axis=axis,
                layers=self.layers,
                alpha=self.alpha,
                on_progress=show,
            )
        if self.title:
            runs = zip(analysis.runs, self.title, strict=True)
            named = [dataclasses.replace(change, name=title) for change, title in runs]
            analysis = dataclasses.replace(analysis, runs=named)
        files = analysis.write(output) | write_plots(analysis, output)
        if self.json:
            print_json(analysis.to_dict())
        else:
            print(analysis.table())
            print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
        return 0


@dataclass(frozen=True, kw_only=True)
class CompareSettings(WorkerSettings):
    """Settings of ``compare``."""

    study: str | None = flag(
        None, "YAML file: methods, subjects, seeds, learning rates.", positional=True
    )
    quick: bool = flag(
        False, "A study of two minutes on an embedded model, to see an example of a report."
    )
    output: str = flag(
        "comparison",
        "Folder of records and report, shared by all workers. Trials with a record in it are not "
        "repeated.",
    )
    report_only: bool = flag(False, "Only report existing records; train nothing.")
    json: bool = flag(False, "Print the records as JSON.")

    def perform(self) -> int:
        """Run the trials without a record, and write the report."""
        study = _study(self)

        from lab.study.report import caution, figures_table, write_report
        from lab.study.run import run_study

        for reason in study.reasons():
            warnings.warn(reason, stacklevel=1)
        output = Path(self.output)
        require_writable(output, is_folder=True)
        with progress("training and measuring", "trial") as show:
            results = run_study(
                study,
                output,
                lambda done, total, record, known: show(done, total),
                only_known=self.report_only,
                address=self.address,
                share=self.share,
            )
        if not results.records:
            raise ConfigError(
                f"{output} contains no record of this study; leave out --report_only", "report_only"
            )
        files = write_report(results, output)
        if doubt := caution(results.records):
            warnings.warn(doubt, stacklevel=1)
        if self.json:
            print_json([*results.tuning, *results.records])
            return 0
        print(aligned(figures_table(results.records)))
        print("\n" + "\n".join(f"{name}: {path}" for name, path in files.items()))
        return 0


def _study(args: CompareSettings) -> Study:
    """Read the study of the file, or return the quick one.

    Raises:
        ConfigError: If both or none of them are requested.
    """
    from lab.study.config import read_study

    if bool(args.study) == args.quick:
        raise ConfigError("give a study's YAML file, or --quick", "study")
    return read_study(args.study or QUICK)
