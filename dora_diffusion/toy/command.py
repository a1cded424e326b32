"""``dora-diffusion demo``."""

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
    from dora_diffusion.sampling.images import save_image
    from dora_diffusion.sampling.load import load_adapted
    from dora_diffusion.toy.benchmark_subjects import find_subject
    from dora_diffusion.toy.judges import evaluate_toy

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
