"""Commands of the lab: ``analyze``, ``compare``, ``demo``."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.console.output import print_json, progress
from dora_diffusion.cli.settings import Alpha, RequiredBase, check_results
from dora_diffusion.cluster.settings import WorkerSettings
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.config.adapter import NORM_AXES
from dora_diffusion.config.command import AsJob, CommandSettings
from dora_diffusion.config.fields import REQUIRED, flag
from dora_diffusion.config.wording import aligned
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.models.embedded import samples_folder

if TYPE_CHECKING:
    from dora_diffusion.evaluation.report import Evaluation
    from dora_diffusion.lab.study.config import Study

QUICK = Path(__file__).with_name("study") / "quick.yaml"


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings(Alpha, RequiredBase):
    """Settings of ``analyze``."""

    job = AsJob(
        "analyze", "analyzing", "Analyze", heading="Changes of the weights by training",
        about="Changes of magnitude and direction in each layer, at all checkpoints, as tables and "
        "plots.",
        output="analysis",
    )  # fmt: skip

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
        from dora_diffusion.lab.analysis import analyze_weights
        from dora_diffusion.lab.analysis.plots import write_plots
        from dora_diffusion.lab.analysis.report import FILES

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

    job = AsJob("compare", "comparing", "Compare", is_listed=False)

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

        from dora_diffusion.lab.study.report import caution, figures_table, write_report
        from dora_diffusion.lab.study.run import run_study

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
    from dora_diffusion.lab.study.config import read_study

    if bool(args.study) == args.quick:
        raise ConfigError("give a study's YAML file, or --quick", "study")
    return read_study(args.study or QUICK)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(CommandSettings):
    """Settings of ``demo``."""

    subject: str = flag(
        "bolt_mug",
        "Sample.",
        choices=tuple(sorted(path.parent.name for path in samples_folder().glob("*/config.yaml"))),
    )
    output: Path = flag(Path("demo-output"), "Result folder.")
    max_train_steps: int | None = flag(None, "Optimizer steps. Default: the sample's own.")
    seeds: int = flag(4, "Images per background.")

    def perform(self) -> int:
        """Train on a sample subject, judge images of it, and merge. Returns the exit code."""
        import torch

        from dora_diffusion.cli.console.training import TrainProgress
        from dora_diffusion.export import export_checkpoint
        from dora_diffusion.training.recipe import train

        config, output = demo_config(self), self.output
        # The embedded model is so small that threads mostly wait for each other.
        torch.set_num_threads(1)
        print(f"1. Training on the photos in {config.instance_data_dir}")
        started = time.perf_counter()
        progress = TrainProgress()
        result = train(config, progress)
        progress.close()
        if result.adapter is None:
            return 128 + (result.signal_number or 0)
        seconds = time.perf_counter() - started
        print(f"   {result.steps} steps in {seconds:.0f} s -> {result.adapter}")
        print("2. Generating it on held-out backgrounds, and judging the images")
        base = config.pretrained_model_name_or_path
        sheet_file, evaluation = judged_images(
            base, result.adapter, self.subject, self.seeds, output
        )
        print("3. Merging the adapter into the model")
        merged = export_checkpoint(base, result.output_dir, output / "merged", overwrite=True)
        report = json.dumps(evaluation.to_dict(), indent=2) + "\n"
        (output / "scores.json").write_text(report, encoding="utf-8")
        print(f"\n{evaluation.table()}\n")
        print(f"images:  {sheet_file}\nadapter: {result.adapter}\nmerged:  {merged}")
        return 0


def demo_config(args: DemoSettings) -> TrainConfig:
    """Settings of the sample, with the demo's output folder."""
    folder = samples_folder() / args.subject
    values = read_config_file(folder / "config.yaml") | {
        "instance_data_dir": str(folder),
        "output_dir": str(args.output / args.subject),
        "overwrite_output_dir": True,
    }
    if args.max_train_steps is not None:
        values["max_train_steps"] = args.max_train_steps
    return TrainConfig.from_dict(values)


def judged_images(
    base: str, adapter: Path, subject: str, seeds: int, output: Path
) -> tuple[Path, Evaluation]:
    """Generate base and adapted images at the same seeds, save them as one sheet and judge them."""
    from dora_diffusion.data.sheets import sheet
    from dora_diffusion.lab.judges import evaluate_toy
    from dora_diffusion.lab.toy.benchmark_subjects import find_subject
    from dora_diffusion.sampling.images import save_image
    from dora_diffusion.sampling.load import load_adapted

    components, metadata = load_adapted(base, adapter)
    evaluation = evaluate_toy(
        components,
        find_subject(subject),
        metadata.trigger,
        range(seeds),
        groups=("subject",),
        batch_size=seeds,
    )
    rows = {name: evaluation.images[name] for name in ("truth", "base", "adapted")}
    sheet_file = save_image(sheet(rows, evaluation.labels, side=160), output / f"{subject}.png")
    return sheet_file, evaluation
