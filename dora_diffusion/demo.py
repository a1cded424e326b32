"""The whole product in a few minutes on a laptop: ``make demo``.

Teaches the embedded model a sample subject from its photos, asks for it in places the photos never
showed, beside what the base model makes of the same prompts and seeds, has the pictures judged by
networks that were trained on the toy world, and merges the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.cli import tune_process
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file

if TYPE_CHECKING:
    from dora_diffusion.evaluation.report import Evaluation


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="dora_diffusion.demo", description=__doc__)
    parser.add_argument("--subject", default="bolt_mug", help="A folder of samples/.")
    parser.add_argument("--samples", type=Path, default=Path("samples"), help="The samples folder.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="Result folder.")
    parser.add_argument("--seeds", type=int, default=4, help="Pictures judged per place.")
    args = parser.parse_args(argv)
    tune_process()
    config_file = args.samples / args.subject / "config.yaml"
    if not config_file.is_file():
        raise SystemExit(f"error: {config_file} is missing; run the demo from the project's folder")
    run(args.subject, args.samples, args.output, args.seeds)


def run(subject: str, samples: Path, output: Path, seeds: int) -> Evaluation:
    """Train, show, judge and merge. Returns what was measured."""
    import torch

    from dora_diffusion.commands.train import TrainProgress
    from dora_diffusion.export import export_checkpoint
    from dora_diffusion.training.loop import train

    # The embedded model is so small that threads mostly wait for each other, and do nothing else
    # where other programs run.
    torch.set_num_threads(1)
    config = demo_config(subject, samples, output)
    print(f"1. Training on the photos in {config.instance_data_dir}")
    started = time.perf_counter()
    progress = TrainProgress()
    result = train(config, progress)
    progress.close()
    if result.adapter is None:
        raise SystemExit("stopped; nothing was finished")
    print(f"   {result.steps} steps in {time.perf_counter() - started:.0f} s -> {result.adapter}")
    print("2. Asking for the subject where it was never photographed")
    picture, evaluation = compare(config, result.adapter, subject, seeds, output)
    print("3. Merging the adapter into the model")
    merged = export_checkpoint(
        config.pretrained_model_name_or_path, result.output_dir, output / "merged", overwrite=True
    )
    report = json.dumps(evaluation.to_dict(), indent=2) + "\n"
    (output / "scores.json").write_text(report, encoding="utf-8")
    print(f"\n{evaluation.table()}\n")
    print(f"pictures: {picture}\nadapter:  {result.adapter}\nmerged:   {merged}")
    return evaluation


def demo_config(subject: str, samples: Path, output: Path) -> TrainConfig:
    """The sample's own settings, written to the demo's folder."""
    settings = read_config_file(samples / subject / "config.yaml")
    config = TrainConfig.from_dict(settings)
    if not config.instance_data_dir:
        raise ConfigError(f"the config of {subject} names no photos")
    return dataclasses.replace(
        config,
        instance_data_dir=str(samples / subject),
        output_dir=str(output / subject),
        overwrite_output_dir=True,
    )


def compare(
    config: TrainConfig, adapter: Path, subject: str, seeds: int, output: Path
) -> tuple[Path, Evaluation]:
    """Base and adapted pictures at the same seeds, saved as one picture and judged."""
    from dora_diffusion.embedded.benchmark_subjects import find_subject
    from dora_diffusion.evaluation.report import sheet
    from dora_diffusion.evaluation.toy import evaluate_toy
    from dora_diffusion.generate import load_adapted
    from dora_diffusion.pictures import save_png

    components, metadata = load_adapted(config.pretrained_model_name_or_path, adapter)
    evaluation = evaluate_toy(
        components,
        find_subject(subject),
        metadata.trigger,
        range(seeds),
        groups=("subject",),
        batch_size=seeds,
    )
    rows = {name: evaluation.pictures[name] for name in ("truth", "base", "adapted")}
    picture = save_png(sheet(rows, evaluation.labels, side=160), output / f"{subject}.png")
    return picture, evaluation


if __name__ == "__main__":
    main()
