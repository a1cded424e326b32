"""Several subjects in one adapter, and a style, measured in the toy world.

    OMP_NUM_THREADS=1 python benchmarks/subjects.py --work /tmp/subjects
    OMP_NUM_THREADS=1 python benchmarks/subjects.py --work /tmp/subjects --only style

Subjects: each is asked for on its held-out backgrounds. Its similarity is that of `evaluate`; an
image leaks where the judge finds another subject of the run in it (above `LEAKAGE`).

Style: images of everything the models know, each redrawn in faded, warm colours with dark
outlines, with captions that say what is drawn and nothing of the style. Asked for are pairs of
things and places that no image showed. ``palette`` is the share of pixels whose colour the style
has, ``lines`` that of pixels darker than those around: of the base, of what was learned, and of the
truth. ``kind`` and ``background`` are the judges' shares of what was asked for, where the palette
is undone before they look, since they know the world's own colours alone.

What is there is not trained again: the folder of a case, ``WORK/CASE``, makes room for it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from dora_diffusion import TrainConfig, load_components, train
from dora_diffusion.data.sheets import image_grid, labelled_sheet
from dora_diffusion.evaluation.measures import LEAKAGE, similarities
from dora_diffusion.evaluation.photos import sample
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.toy.benchmark_subjects import SUBJECTS, TRIGGER, write_photos
from dora_diffusion.toy.instrument import load_instrument
from dora_diffusion.toy.judges import (
    JUDGED_SIZE,
    SAMPLING,
    ToyRequest,
    compose,
    judge,
    reference_images,
    sample_subject,
    toy_requests,
    true_images,
)
from dora_diffusion.toy.shapes import CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, PLACES, render

TOKENS = (TRIGGER, "zwx", "vqo")
# Case -> embedded model, steps, and the subjects that one adapter learns.
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "two-classes": ("tiny-sd", 400, ("cross_mug", "star_teapot")),
    "one-class": ("tiny-sd", 400, ("star_teapot", "heart_teapot")),
    "three": ("tiny-sdxl", 600, ("cross_mug", "star_teapot", "striped_car")),
}
COMMON: dict[str, Any] = {
    "rank": 8, "conv_rank": 8, "learning_rate": 2e-3, "lr_scheduler": "cosine", "snr_gamma": 5,
    "lr_warmup_steps": 10, "train_batch_size": 5, "num_validation_images": 0,
    "checkpointing_steps": 0, "overwrite_output_dir": True,
}  # fmt: skip
# The style: colours half way to a warm tone of their luminance, and lines of ink.
INK, DARK, LIGHT = (20, 16, 34), np.array((58, 44, 52)), np.array((250, 226, 178))
FADE = 0.4 * np.eye(3) + 0.6 * np.outer((LIGHT - DARK - 102) / 153, (0.3, 0.59, 0.11))
EDGE, NEAR = 48, 30
STYLE_PHOTOS, STYLE_STEPS = 20, 400
SHOWN = 6


def open_run(case: str, work: Path, settings: dict[str, Any]) -> Components:
    """The model of a case with its adapter, which is trained where it is not there."""
    folder = work / case / "run"
    if not list(folder.glob("*.safetensors")):
        train(TrainConfig.from_dict({**COMMON, **settings, "output_dir": str(folder)}))
    return load_adapted(settings["pretrained_model_name_or_path"], folder)[0]


def subjects_case(case: str, work: Path, **settings: Any) -> dict[str, Any]:
    """Train the subjects of a case in one adapter, and judge each."""
    model, steps, names = CASES[case]
    entries = []
    for name, token in zip(names, TOKENS, strict=False):
        folder, subject = work / case / name, SUBJECTS[name]
        for photo in write_photos(subject, folder):
            caption = photo.with_suffix(".txt")
            text = caption.read_text("utf-8").replace(f" {TRIGGER} ", f" {token} ")
            caption.write_text(text, encoding="utf-8")
        entries.append({
            "instance_data_dir": str(folder), "token": token, "class_word": subject.word,
            "instance_prompt": f"a photo of a {token} {subject.word}",
        })  # fmt: skip
    components = open_run(case, work, {
        "pretrained_model_name_or_path": f"embedded:{model}", "max_train_steps": steps,
        "dataset_config": entries, **settings,
    })  # fmt: skip
    instrument = load_instrument()
    truth = {n: judge(instrument, reference_images(SUBJECTS[n], JUDGED_SIZE)) for n in names}
    result: dict[str, Any] = {"steps": steps, "model": model}
    shown, rows = [], []
    for name, entry in zip(names, entries, strict=True):
        trigger = f"{entry['token']} {entry['class_word']}"
        requests = toy_requests(SUBJECTS[name], trigger, range(4), ["subject"])
        images = sample(components, requests, SAMPLING, 8, None)
        seen = judge(instrument, images).identity
        cosines = {other: similarities(seen, truth[other].identity) for other in names}
        leaked = sum(c > LEAKAGE for n, found in cosines.items() if n != name for c in found)
        result[name] = {
            "trigger": trigger,
            "similarity": round(fmean(cosines[name]), 3),
            "leaked": leaked,
            "images": len(images),
        }
        shown += [true_images(requests[:1], images[0].width)[0], *images[:SHOWN]]
        rows.append(f"{trigger} (similarity {result[name]['similarity']:.2f})")
    save_sheet(work / f"{case}.jpg", shown, rows, f"{len(names)} subjects, one adapter, {model}")
    return result


def save_sheet(path: Path, images: list[Image.Image], rows: list[str], title: str) -> None:
    """Rows of the truth and what was learned, enlarged."""
    large = [image.resize((96, 96), Image.Resampling.LANCZOS) for image in images]
    columns = ["truth", *["learned"] * (len(images) // len(rows) - 1)]
    labelled_sheet(large, title, rows, columns).save(path, quality=88)


def restyled(image: Image.Image) -> Image.Image:
    """An image in faded, warm colours, with ink where its colours change."""
    pixels = np.asarray(image.filter(ImageFilter.MedianFilter(3)), np.float32)
    edges = np.zeros(pixels.shape[:2], bool)
    edges[1:] |= np.linalg.norm(pixels[1:] - pixels[:-1], axis=-1) > EDGE
    edges[:, 1:] |= np.linalg.norm(pixels[:, 1:] - pixels[:, :-1], axis=-1) > EDGE
    lines = np.asarray(Image.fromarray(edges).convert("L").filter(ImageFilter.MaxFilter(3)))
    drawn = np.where(lines[..., None] > 0, np.array(INK), pixels @ FADE.T + DARK)
    return Image.fromarray(drawn.round().astype(np.uint8))


def with_colours_back(image: Image.Image) -> Image.Image:
    """An image whose palette is undone, as the judges know the world; ink stays dark."""
    pixels = (np.asarray(image.convert("RGB"), np.float32) - DARK) @ np.linalg.inv(FADE).T
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def style_measures(images: list[Image.Image]) -> dict[str, float]:
    """The share of pixels whose colour the style has, and of those that are dark lines."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    ink = np.linalg.norm(pixels - np.array(INK), axis=-1) < NEAR
    world = (pixels - DARK) @ np.linalg.inv(FADE).T
    inside = ((world > -NEAR) & (world < 255 + NEAR)).all(-1)
    grey = [image.convert("L") for image in images]
    around = np.stack([np.asarray(i.filter(ImageFilter.MedianFilter(5)), np.float32) for i in grey])
    lines = around - np.stack([np.asarray(image, np.float32) for image in grey]) > NEAR
    return {
        "palette": round(float((inside | ink).mean()), 3),
        "lines": round(float(lines.mean()), 3),
    }


def scenes(first: int, count: int, shift: int) -> list[ToyRequest]:
    """Things of every class in places, captioned by what they are."""
    requests = []
    for number in range(first, first + count):
        generator = np.random.default_rng((97, number))
        kind = list(CLASSES)[number % len(CLASSES)]
        background = list(BACKGROUNDS)[(number * 3 + shift) % len(BACKGROUNDS)]
        thing = sample_subject(generator, kind)
        prompt = f"a photo of a {thing.color} {kind} {PLACES[background][0]}"
        scene = compose(thing, background, generator)
        requests.append(
            ToyRequest("others", prompt, 0, number, scene, {"kind": kind, "background": background})
        )
    return requests


def style_case(work: Path) -> dict[str, Any]:
    """Train a style, and judge what of it is learned and what is still drawn."""
    folder = work / "style" / "drawings"
    folder.mkdir(parents=True, exist_ok=True)
    for number, request in enumerate(scenes(0, STYLE_PHOTOS, 0)):
        photo = folder / f"{number:02d}.png"
        restyled(Image.fromarray(render(request.scene, 256))).save(photo)
        photo.with_suffix(".txt").write_text(request.prompt + "\n", encoding="utf-8")
    base = "embedded:tiny-sd"
    settings = {
        "pretrained_model_name_or_path": base, "instance_data_dir": str(folder), "token": "",
        "max_train_steps": STYLE_STEPS,
    }  # fmt: skip
    learned = open_run("style", work, settings)
    requests = [replace(r, seed=1000 + r.seed) for r in scenes(100, 2 * len(CLASSES), 1)]
    drawings = {
        "base": sample(load_components(base), requests, SAMPLING, 8, None),
        "learned": sample(learned, requests, SAMPLING, 8, None),
        "truth": [
            restyled(image).resize((JUDGED_SIZE,) * 2) for image in true_images(requests, 256)
        ],
    }
    instrument, result = load_instrument(), {"steps": STYLE_STEPS, "images": len(requests)}
    for name, images in drawings.items():
        looked_at = images if name == "base" else [with_colours_back(image) for image in images]
        answers = judge(instrument, looked_at).answers
        right = {
            what: round(float(np.mean([
                answer == request.wanted[what]
                for answer, request in zip(answers[what], requests, strict=True)
            ])), 3)
            for what in ("kind", "background")
        }  # fmt: skip
        result[name] = {**style_measures(images), **right}
    rows = ["the base model", "with the style", "the truth"]
    columns = [request.prompt.removeprefix("a photo of a ") for request in requests[:8]]
    large = [
        image.resize((96, 96), Image.Resampling.LANCZOS)
        for images in drawings.values()
        for image in images[:8]
    ]
    labelled_sheet(large, "A style, one adapter, tiny-sd", rows, columns).save(
        work / "style.jpg", quality=88
    )
    image_grid([Image.open(p) for p in sorted(folder.glob("*.png"))[:8]], columns=8).resize(
        (776, 96)
    ).save(work / "style-photos.jpg", quality=88)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of photos and adapters")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "style"], default=[*CASES, "style"])
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for case in args.only:
        more = {} if args.steps is None else {"max_train_steps": args.steps}
        result = (
            style_case(args.work) if case == "style" else subjects_case(case, args.work, **more)
        )
        (args.work / f"{case}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        print(case, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
