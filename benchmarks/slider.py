"""Sliders on the toy world: what its judges see at each strength, and what else moves.

    OMP_NUM_THREADS=1 python benchmarks/slider.py --output slider-runs

Trains sliders of size and of colour on the embedded model: as a LoRA, the same with anchors, and as
a DoRA. Samples mugs in the studio at strengths from -3 to 3, seed by seed, and classes that must
not move at both ends. Size is the root of the share of the image that has a colour; colour is red
minus blue of what has one. The class is what the classifier says: of all images, and of the seeds
where the base model's own image shows the class. What moves is the mean absolute difference of
pixels to the base's image of the same seed. A run that is there is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dora_diffusion import TrainConfig, generate_images, load_components, set_strength, train
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.toy.instrument import load_instrument, silhouette
from dora_diffusion.toy.judges import SAMPLING, judge

STRENGTHS, OTHERS = (-3.0, -1.5, 0.0, 1.5, 3.0), (-3.0, -1.0, 0.0, 1.0, 3.0)
FEW_STEPS = replace(SAMPLING, steps=10)
TARGET = "mug"
ENDS = {"size": ("large", "small"), "colour": ("red", "blue")}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "anchored": {"anchors": ["a photo of a teapot"]},
    "dora": {"method": "dora"},
}
SHOWN = 3
"""Seeds that the image shows."""


def size_of(pixels: Tensor) -> float:
    """Root of the coloured share of an image ``(3, h, w)`` in [0, 1]; 0 without any."""
    shape = silhouette(pixels)
    return 0.0 if shape is None else shape.size


def redness_of(pixels: Tensor) -> float:
    """Red minus blue of the coloured pixels of an image ``(3, h, w)`` in [0, 1]."""
    colored = pixels[:, (pixels.amax(0) - pixels.amin(0)) > 0.12]
    return float((colored[0] - colored[2]).mean()) if colored.numel() else 0.0


SCORES: dict[str, Callable[[Tensor], float]] = {"size": size_of, "colour": redness_of}


def trained(slider: str, variant: str, args: argparse.Namespace) -> Path:
    """Return the folder of a slider's run, which is trained if it is not there."""
    folder: Path = args.output / f"{slider}-{variant}"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return folder
    positive, negative = (f"a photo of a {word} {TARGET}" for word in ENDS[slider])
    train(TrainConfig(
        teach="slider", target=[f"a photo of a {TARGET}"], positive=[positive], negative=[negative],
        slider_guidance=args.guidance, num_class_images=args.class_images,
        learning_rate=args.rate, lr_scheduler="cosine", lr_warmup_steps=10, conv_rank=8,
        train_batch_size=args.batch, max_train_steps=args.steps, num_validation_images=0,
        validation_guidance_scale=FEW_STEPS.guidance_scale,
        validation_inference_steps=FEW_STEPS.steps, checkpointing_steps=0,
        output_dir=str(folder), overwrite_output_dir=True, **VARIANTS[variant],
    ))  # fmt: skip
    return folder


@torch.no_grad()
def scale_error(components: Components, strength: float = 0.5) -> float:
    """Distance of PEFT's scale to the strength: relative, of the change of all weights."""
    wanted, off = 0.0, 0.0
    for _, layer in adapted_layers(components.denoiser):
        weight, own = layer.dense(), layer.adapters["default"].weights()
        change = adapted_weight(weight, own, strength=strength) - weight
        scaled = adapted_weight(weight, own, direction_strength=strength) - weight
        wanted += float(change.square().sum())
        off += float((scaled - change).square().sum())
    return float((off / wanted) ** 0.5)


@lru_cache
def base_images(kind: str, count: int) -> list[Image.Image]:
    """Images of a class in the studio by the base model, one per seed."""
    components = load_components("embedded:tiny-sd")
    return generate_images(components, prompt_of(kind), range(count), FEW_STEPS, batch_size=8)


def prompt_of(kind: str) -> str:
    """A prompt that no slider is trained on."""
    return f"a photo of a {kind} in a studio"


def sampled(components: Components, kind: str, count: int) -> dict[float, list[Image.Image]]:
    """Images of a class in the studio by strength, one per seed; those of 0 are the base's."""
    made = {0.0: base_images(kind, count)}
    for strength in STRENGTHS if kind == TARGET else OTHERS:
        if strength:
            set_strength(components.denoiser, strength)
            seeds = range(count)
            images = generate_images(components, prompt_of(kind), seeds, FEW_STEPS, batch_size=8)
            made[strength] = images
    return dict(sorted(made.items()))


def report(name: str, kind: str, made: dict[float, list[Image.Image]]) -> Iterator[str]:
    """Rows of the table: score of the slider, class, and distance to the base's images."""
    judged = [judge(load_instrument(), images) for images in made.values()]
    slider, middle = name.split(",")[0], len(judged) // 2
    base = judged[middle]
    shown = [[each == kind for each in one.answers["kind"]] for one in judged]
    there = shown[middle]
    kept = [mean(now for now, before in zip(one, there, strict=True) if before) for one in shown]
    rows = {
        slider: [f"{mean(map(SCORES[slider], one.pixels)):.2f}" for one in judged],
        "shows the class": [f"{mean(one):.0%}" for one in shown],
        "of those where the base's does": [f"{share:.0%}" for share in kept],
        "pixels moved": [f"{float((one.pixels - base.pixels).abs().mean()):.3f}" for one in judged],
    }
    if slider == "colour":
        for word in ENDS[slider]:
            rows[f"is {word}"] = [
                f"{mean(answer == word for answer in one.answers['color']):.0%}" for one in judged
            ]
    for label, cells in rows.items():
        yield f"| {name}, {kind}s: {label} | {' | '.join(cells)} |"


def main() -> None:
    """Train, sample, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sliders", nargs="+", choices=tuple(ENDS), default=list(ENDS))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, default=TrainConfig.slider_guidance)
    parser.add_argument("--class_images", type=int, default=24)
    parser.add_argument("--images", type=int, default=20, help="Images of mugs per strength.")
    parser.add_argument("--others", type=int, default=10, help="Images of others per strength.")
    parser.add_argument("--kinds", nargs="+", default=[TARGET, "teapot"])
    args = parser.parse_args()
    print(f"Mugs at strengths {STRENGTHS}, other classes at {OTHERS}", flush=True)
    for slider, variant in product(args.sliders, args.variants):
        components, _ = load_adapted("embedded:tiny-sd", trained(slider, variant, args))
        off = scale_error(components)
        print(f"{slider}, {variant}: {off:.0%} off with PEFT's scale of 0.5", flush=True)
        for kind in args.kinds:
            made = sampled(components, kind, args.images if kind == TARGET else args.others)
            print(*report(f"{slider}, {variant}", kind, made), sep="\n", flush=True)
            rows = [images[seed] for seed in range(SHOWN) for images in made.values()]
            labels = [f"seed {seed}" for seed in range(SHOWN)]
            columns = [f"strength {s:g}" for s in made]
            sheet = labelled_sheet(rows, f"{slider}, {variant}", labels, columns)
            sheet.save(args.output / f"{slider}-{variant}-{kind}.jpg", quality=90)


if __name__ == "__main__":
    main()
