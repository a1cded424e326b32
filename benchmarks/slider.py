"""Sliders on the toy world: what its judges see at each strength.

    OMP_NUM_THREADS=1 python benchmarks/slider.py --output slider-runs

Trains a slider of size and one of colour on the embedded model, with each method, and samples the
base's mugs in the studio at strengths from -3 to 3, seed by seed. Size is the root of the share of
the image that has a colour; colour is red minus blue of what has one; the class is what the
classifier says. A run that is there is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

from dora_diffusion import TrainConfig, generate_images, set_strength, train
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.data.sheets import labelled_sheet
from dora_diffusion.lab.judges import SAMPLING, judge
from dora_diffusion.lab.toy.instrument import load_instrument, silhouette
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.dora import adapted_weight
from dora_diffusion.sampling.generate import load_adapted

STRENGTHS = (-3.0, -1.5, 0.0, 1.5, 3.0)
ENDS = {"size": ("large", "small"), "colour": ("red", "blue")}
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


def trained(slider: str, method: str, args: argparse.Namespace) -> Path:
    """Return the folder of a slider's run, which is trained if it is not there."""
    folder = args.output / f"{slider}-{method}"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return folder
    positive, negative = (f"a photo of a {word} mug" for word in ENDS[slider])
    train(TrainConfig(
        teach="slider", target=["a photo of a mug"], positive=[positive], negative=[negative],
        anchors=["a photo of a teapot"] if args.anchors else [], method=method,
        slider_guidance=args.guidance, num_class_images=args.class_images,
        learning_rate=args.rate, lr_scheduler="cosine", lr_warmup_steps=10, conv_rank=8,
        train_batch_size=args.batch, max_train_steps=args.steps, num_validation_images=0,
        validation_guidance_scale=SAMPLING.guidance_scale, checkpointing_steps=0,
        output_dir=str(folder), overwrite_output_dir=True,
    ))  # fmt: skip
    return folder


@torch.no_grad()
def scale_error(components: Components, strength: float = 0.5) -> float:
    """Distance of PEFT's scale to the strength: relative, of the change of all weights."""
    wanted, off = 0.0, 0.0
    for _, layer in adapted_layers(components.unet):
        weight, own = layer.dense(), layer.adapters["default"].weights()
        change = adapted_weight(weight, own, strength=strength) - weight
        scaled = adapted_weight(weight, own, direction_strength=strength) - weight
        wanted += float(change.square().sum())
        off += float((scaled - change).square().sum())
    return float((off / wanted) ** 0.5)


def sampled(components: Components, kind: str, count: int) -> list[list[Image.Image]]:
    """Images of a class in the studio: of each strength one per seed."""
    prompt, made = f"a photo of a {kind} in a studio", []
    for strength in STRENGTHS:
        set_strength(components.unet, strength)
        made.append(generate_images(components, prompt, range(count), SAMPLING, batch_size=8))
    return made


def main() -> None:
    """Train, sample, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sliders", nargs="+", choices=tuple(ENDS), default=list(ENDS))
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, default=TrainConfig.slider_guidance)
    parser.add_argument("--class_images", type=int, default=24)
    parser.add_argument("--images", type=int, default=10, help="Images per strength.")
    parser.add_argument("--anchors", action="store_true", help="Hold teapots where they are.")
    parser.add_argument("--kinds", nargs="+", default=["mug"], help="Classes that are sampled.")
    args = parser.parse_args()
    print(f"| slider, method | {' | '.join(f'{s:g}' for s in STRENGTHS)} |")
    print(f"|---|{'---|' * len(STRENGTHS)}")
    for slider in args.sliders:
        for method in args.methods:
            folder = trained(slider, method, args)
            components, _ = load_adapted("embedded:tiny-sd", folder)
            off = scale_error(components)
            print(f"{slider}, {method}: {off:.0%} off with PEFT's scale of 0.5", flush=True)
            for kind in args.kinds:
                made = sampled(components, kind, args.images)
                judged = [judge(load_instrument(), images) for images in made]
                scores = [f"{mean(map(SCORES[slider], each.pixels)):.2f}" for each in judged]
                kept = [f"{mean(k == kind for k in each.answers['kind']):.0%}" for each in judged]
                print(f"| {slider}, {method}, {kind}s | {' | '.join(scores)} |")
                print(f"| class | {' | '.join(kept)} |", flush=True)
                rows = [images[seed] for seed in range(SHOWN) for images in made]
                labels = [f"seed {seed}" for seed in range(SHOWN)]
                columns = [f"strength {s:g}" for s in STRENGTHS]
                sheet = labelled_sheet(rows, f"{slider}, {method}", labels, columns)
                sheet.save(args.output / f"{slider}-{method}-{kind}.jpg", quality=90)


if __name__ == "__main__":
    main()
