"""``dora-diffusion demo``, or ``make demo``: the whole product in a few minutes on a laptop.

Trains the embedded model on a sample subject, generates it on held-out backgrounds, beside the base
model's images of the same prompts and seeds, has the images judged by networks that were trained on
the toy world, and merges the result.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.fields import flag
from dora_diffusion.models.embedded import samples_folder

if TYPE_CHECKING:
    from dora_diffusion.evaluation.report import Evaluation


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
    seeds: int = flag(4, "Images judged per background.")


SETTINGS = DemoSettings


def run(args: DemoSettings) -> int:
    """Train on a sample subject, generate it, judge and merge. Returns the exit code."""
    import torch

    from dora_diffusion.cli.console.training import TrainProgress
    from dora_diffusion.export import export_checkpoint
    from dora_diffusion.training.loop import train

    config, output = demo_config(args), args.output
    # The embedded model is so small that threads mostly wait for each other, and do nothing else
    # where other programs run.
    torch.set_num_threads(1)
    print(f"1. Training on the photos in {config.instance_data_dir}")
    started = time.perf_counter()
    progress = TrainProgress()
    result = train(config, progress)
    progress.close()
    if result.adapter is None:
        return 128 + (result.signal_number or 0)
    print(f"   {result.steps} steps in {time.perf_counter() - started:.0f} s -> {result.adapter}")
    print("2. Generating it on held-out backgrounds, and judging the images")
    base = config.pretrained_model_name_or_path
    sheet_file, evaluation = compare(base, result.adapter, args.subject, args.seeds, output)
    print("3. Merging the adapter into the model")
    merged = export_checkpoint(base, result.output_dir, output / "merged", overwrite=True)
    report = json.dumps(evaluation.to_dict(), indent=2) + "\n"
    (output / "scores.json").write_text(report, encoding="utf-8")
    print(f"\n{evaluation.table()}\n")
    print(f"images:  {sheet_file}\nadapter: {result.adapter}\nmerged:  {merged}")
    return 0


def demo_config(args: DemoSettings) -> TrainConfig:
    """The sample's own settings, written to the demo's folder."""
    folder = samples_folder() / args.subject
    values = read_config_file(folder / "config.yaml") | {
        "instance_data_dir": str(folder),
        "output_dir": str(args.output / args.subject),
        "overwrite_output_dir": True,
    }
    if args.max_train_steps is not None:
        values["max_train_steps"] = args.max_train_steps
    return TrainConfig.from_dict(values)


def compare(
    base: str, adapter: Path, subject: str, seeds: int, output: Path
) -> tuple[Path, Evaluation]:
    """Base and adapted images at the same seeds, saved as one sheet and judged."""
    from dora_diffusion.data.sheets import sheet
    from dora_diffusion.lab.judges import evaluate_toy
    from dora_diffusion.lab.toy.benchmark_subjects import find_subject
    from dora_diffusion.sampling.generate import load_adapted
    from dora_diffusion.sampling.images import save_png

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
    sheet_file = save_png(sheet(rows, evaluation.labels, side=160), output / f"{subject}.png")
    return sheet_file, evaluation
