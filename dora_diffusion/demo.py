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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.config import ConfigError, TrainConfig, read_config_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.evaluation.toy_subjects import SubjectScore
    from dora_diffusion.models.components import Components

_GUIDANCE = 3.5
_STEPS = 25


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="dora_diffusion.demo", description=__doc__)
    parser.add_argument("--subject", default="bolt_mug", help="A folder of samples/.")
    parser.add_argument("--samples", type=Path, default=Path("samples"), help="The samples folder.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="Result folder.")
    parser.add_argument("--seeds", type=int, default=4, help="Pictures judged per place.")
    args = parser.parse_args(argv)
    config_file = args.samples / args.subject / "config.yaml"
    if not config_file.is_file():
        raise SystemExit(f"error: {config_file} is missing; run the demo from the project's folder")
    run(args.subject, args.samples, args.output, args.seeds)


def run(subject: str, samples: Path, output: Path, seeds: int) -> dict[str, SubjectScore]:
    """Train, show, judge and merge. Returns the scores of base and adapted model."""
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
    picture, scores = compare(config, result.adapter, subject, seeds, output)
    print("3. Merging the adapter into the model")
    merged = export_checkpoint(
        config.pretrained_model_name_or_path, result.output_dir, output / "merged", overwrite=True
    )
    report = {name: dataclasses.asdict(score) for name, score in scores.items()}
    (output / "scores.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(_table(scores))
    print(f"pictures: {picture}\nadapter:  {result.adapter}\nmerged:   {merged}")
    return scores


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
) -> tuple[Path, dict[str, SubjectScore]]:
    """Base and adapted pictures at the same seeds, saved as one picture and judged."""
    from dora_diffusion.adapters.files import load_adapter
    from dora_diffusion.adapters.inject import disabled
    from dora_diffusion.embedded.instrument import load_instrument
    from dora_diffusion.embedded.samples import NEW_BACKGROUNDS, SAMPLE_SUBJECTS
    from dora_diffusion.evaluation.toy_subjects import evaluate_subject, true_pictures
    from dora_diffusion.models.load import load_components
    from dora_diffusion.pictures import save_png

    sample, instrument = SAMPLE_SUBJECTS[subject], load_instrument()
    components = load_components(config.pretrained_model_name_or_path)
    load_adapter(components.adaptable(), adapter)
    rows = {"truth": [true_pictures(sample, place, 1)[0] for place in NEW_BACKGROUNDS]}
    scores = {}
    for name in ("base", "adapted"):
        with ExitStack() as stack:
            if name == "base":
                stack.enter_context(disabled(*components.adaptable().values()))
            kept: list[Image] = []
            scores[name] = evaluate_subject(
                _generator(components, kept), sample, instrument, count=seeds
            )
        rows[name] = kept[::seeds]
    grid = _labelled(rows, list(NEW_BACKGROUNDS))
    return save_png(grid, output / f"{subject}.png"), scores


def _generator(components: Components, kept: list[Image]) -> Callable[[str, int, int], list[Image]]:
    """The model as the evaluation wants it: a list of pictures for a prompt."""
    from dora_diffusion.generate import SamplingSettings, generate_images

    settings = SamplingSettings(steps=_STEPS, guidance_scale=_GUIDANCE)

    def generate(prompt: str, seed: int, count: int) -> list[Image]:
        seeds = [seed * 1000 + number for number in range(count)]
        images = generate_images(components, prompt, seeds, settings, batch_size=count)
        kept.extend(images)
        return images

    return generate


def _labelled(rows: dict[str, list[Image]], columns: list[str]) -> Image:
    """Rows of pictures, enlarged, with their names and the places' names."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    side, left, top, gap = 160, 80, 24, 4
    size = (left + len(columns) * (side + gap), top + len(rows) * (side + gap))
    sheet = PILImage.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        draw.text((left + x * (side + gap) + 4, 6), column, fill="black", font_size=13)
    for y, (name, images) in enumerate(rows.items()):
        draw.text((6, top + y * (side + gap) + side // 2 - 8), name, fill="black", font_size=13)
        for x, image in enumerate(images):
            resized = image.resize((side, side), PILImage.Resampling.LANCZOS)
            sheet.paste(resized, (left + x * (side + gap), top + y * (side + gap)))
    return sheet


def _table(scores: dict[str, SubjectScore]) -> str:
    """The scores as the README shows them."""
    lines = ["", "| model | subject similarity | place as asked | pictures |", "|---|---|---|---|"]
    for name, score in scores.items():
        lines.append(
            f"| {name} | {score.similarity:.2f} | {score.background_accuracy:.0%} "
            f"| {score.pictures} |"
        )
    ceiling = next(iter(scores.values())).ceiling
    return "\n".join([*lines, f"\nOther true pictures of the subject score {ceiling:.2f}.\n"])


if __name__ == "__main__":
    main()
