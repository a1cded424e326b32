"""Methods compared on subjects that no embedded model has seen: DoRA, LoRA and full fine-tuning.

    python benchmarks/subjects.py --work DIR --tune     # learning rates, on the tuning subjects
    python benchmarks/subjects.py --work DIR            # the comparison, on the reported subjects

Every run learns one subject from five photos with one seed, and is then asked for what
`dora-diffusion evaluate` asks for, poses aside. All methods share code, photos, draws, steps and
prompts; each has a learning rate of its own, chosen on other subjects. Intervals are over subjects
and seeds (two-level bootstrap).

Results are kept per run, so a stopped comparison continues, and `--results` keeps them in one file
that another machine continues from. Two halves can run side by side:

    for part in 0 1; do python benchmarks/subjects.py --work DIR --part $part & done; wait
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dora_diffusion.adapters.inject import remove_adapters
from dora_diffusion.config import TrainConfig
from dora_diffusion.evaluation.measures import seed_means, title_of
from dora_diffusion.evaluation.report import aligned, sheet, shown
from dora_diffusion.evaluation.statistics import Interval, cluster_interval
from dora_diffusion.evaluation.toy.evaluate import answer, measure
from dora_diffusion.evaluation.toy.requests import Group, ToyRequest, toy_requests, true_images
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.images import save_png
from dora_diffusion.toy import model_folder
from dora_diffusion.toy.benchmark_subjects import (
    REPORTED,
    TUNING,
    BenchmarkSubject,
    find_subject,
    write_photos,
)
from dora_diffusion.toy.captions import PLACES
from dora_diffusion.toy.samples import TRIGGER
from dora_diffusion.training.accelerator import make_accelerator
from dora_diffusion.training.optimizer import build_lr_schedule, build_optimizer
from dora_diffusion.training.session import Session, open_session
from dora_diffusion.training.step import TrainingStep
from dora_diffusion.training.subject import subject_of

GROUPS: tuple[Group, ...] = ("subject", "class", "others")
METHODS = ("base", "dora", "lora", "full")
RATES = {"base": 0.0, "dora": 2e-3, "lora": 2e-3, "full": 8e-4}
"""Of `GRID`, on the tuning subjects: the most similarity that costs other classes nothing."""

GRID = {"dora": (1e-3, 2e-3, 4e-3), "lora": (1e-3, 2e-3, 4e-3), "full": (2e-4, 4e-4, 8e-4, 1.6e-3)}
SHOWN = (
    "subject_similarity", "background", "class_kind", "class_leakage", "others_kind",
    "others_color", "others_background", "others_leakage", "denoising_loss", "others_loss",
)  # fmt: skip
SHARES = {"background", "class_kind", "class_leakage", "others_kind", "others_color"} | {
    "others_background", "others_leakage",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: everything that its result depends on."""

    base: str
    method: str
    subject: str
    seed: int
    learning_rate: float
    steps: int
    prior: bool
    text_encoder: bool

    @property
    def model(self) -> str:
        """The base's short name."""
        return Path(self.base.removeprefix("embedded:")).name

    @property
    def name(self) -> str:
        """Its file's name."""
        flags = ("-prior" if self.prior else "") + ("-text" if self.text_encoder else "")
        rate = f"{self.learning_rate:g}"
        return f"{self.model}-{self.method}-{rate}-{self.steps}{flags}-{self.subject}-{self.seed}"


class FullStep(TrainingStep):
    """The same training of every weight that the adapters would adapt, and of their biases."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def config_of(run: Run, work: Path) -> TrainConfig:
    """The settings of a run, alike for all methods but for what the method is."""
    subject = find_subject(run.subject)
    photos = work / "photos" / run.subject
    if not photos.is_dir():
        write_photos(subject, photos)
    return TrainConfig(
        pretrained_model_name_or_path=run.base,
        instance_data_dir=str(photos),
        instance_prompt=f"a photo of a {TRIGGER} {subject.word}",
        class_word=subject.word,
        learning_rate=max(run.learning_rate, 1e-12),
        text_encoder_lr=max(run.learning_rate, 1e-12) / 4,
        train_text_encoder=run.text_encoder,
        use_dora=run.method != "lora",
        rank=8,
        conv_rank=8,
        train_batch_size=5,
        lr_scheduler="cosine",
        lr_warmup_steps=10,
        max_train_steps=run.steps,
        with_prior_preservation=run.prior,
        class_data_dir=str(work / "class" / run.model / subject.word),
        validation_guidance_scale=3.5,
        num_class_images=50,
        sample_batch_size=10,
        seed=run.seed,
        output_dir=str(work / "output"),
        overwrite_output_dir=True,
    )


def open_run(run: Run, work: Path) -> Session:
    """The session of a run; full fine-tuning trains the weights under the adapters instead."""
    config = config_of(run, work)
    session = open_session(config, subject_of(config), make_accelerator(config))
    if run.method != "full":
        return session
    adapted = {layer.path for layer in session.adapters.report.layers}
    trained = []
    for part, model in session.adapters.modules.items():
        remove_adapters(model)
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            if owner in adapted or f"{part}.{owner}" in adapted:
                trained.append(parameter.requires_grad_(True))
    group = {"name": "weights", "params": trained, "lr": run.learning_rate, "weight_decay": 0.01}
    optimizer = session.accelerator.prepare_optimizer(build_optimizer([group], config))
    schedule = build_lr_schedule(optimizer.optimizer, config)
    fields = {f.name: getattr(session.train_step, f.name) for f in dataclasses.fields(TrainingStep)}
    step = FullStep(**fields | {"optimizer": optimizer, "lr_schedule": schedule})
    return dataclasses.replace(session, train_step=step)


@lru_cache
def digest_of(base: str) -> str:
    """The start of the SHA-256 of a model's UNet: results are about these weights."""
    name = base.removeprefix("embedded:")
    folder = Path(base) if name == base else model_folder(name)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def image_file(run: Run, work: Path, place: str) -> Path:
    """Where a run's image of its subject in a place is; only those of the first seed are kept."""
    return work / "pictures" / f"{run.name}-{place}.png"


def first_request(subject: BenchmarkSubject) -> ToyRequest:
    """What the grid shows of a subject: its first new place."""
    (request, *_) = toy_requests(subject, f"{TRIGGER} {subject.word}", [0], ("subject",))
    return request


def perform(run: Run, work: Path, *, with_image: bool = False) -> dict[str, Any]:
    """Train and measure one run, or read what an earlier call measured on the same base.

    ``with_image`` does it again if there is no image of it for the grid.
    """
    file = work / "runs" / f"{run.name}.json"
    subject = find_subject(run.subject)
    place = first_request(subject).wanted["background"]
    in_grid = image_file(run, work, place)
    if file.is_file() and (in_grid.is_file() or run.seed > 0 or not with_image):
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["digest"] == digest_of(run.base):
            return known
    session, started = open_run(run, work), time.perf_counter()
    if run.method != "base":
        for step in range(1, run.steps + 1):
            loss = float(session.train_step(step)["loss"])
            if loss != loss:
                raise FloatingPointError(f"{run.name}: the loss is not a number at step {step}")
    seconds = time.perf_counter() - started
    for model in session.adapters.modules.values():
        model.eval()
    requests = toy_requests(subject, session.subject.trigger, [run.seed], GROUPS)
    answers = answer(session.components, requests)
    values = measure(subject, requests, answers)
    result = {
        **dataclasses.asdict(run),
        "digest": digest_of(run.base),
        "seconds": round(seconds, 1),
        "measures": {n: round(seed_means(groups)[0], 5) for n, groups in values.items()},
    }
    for request, image in zip(requests, answers.images, strict=True):
        if request.group == "subject" and run.seed == 0:
            place = request.wanted["background"]
            save_png(image, image_file(run, work, place))
    save_text(file, json.dumps(result, indent=2) + "\n")
    return result


def score(results: Iterable[dict[str, Any]], measure_name: str) -> Interval | None:
    """Mean over subjects and seeds, with its interval; None where it was never measured."""
    by_subject: dict[str, list[float]] = {}
    for result in results:
        if measure_name in result["measures"]:
            value = result["measures"][measure_name]
            by_subject.setdefault(result["subject"], []).append(value)
    return cluster_interval(by_subject) if by_subject else None


def table(results: list[dict[str, Any]], methods: Iterable[str]) -> str:
    """One column per method."""
    columns = {m: [r for r in results if r["method"] == m] for m in methods}
    rows = [["measure", *columns]]
    for name in SHOWN:
        found = [score(runs, name) for runs in columns.values()]
        rows.append([title_of(name), *(shown(one, name in SHARES) for one in found)])
    rows.append(["seconds of training", *(f"{_mean_seconds(r):.0f}" for r in columns.values())])
    return aligned(rows)


def differences(results: list[dict[str, Any]], methods: Iterable[str]) -> str:
    """Each method's difference to LoRA on the same subject and seed."""
    others = [method for method in methods if method not in ("base", "lora")]
    rows = [["difference to lora", *others]]
    for name in SHOWN:
        found = [_difference(results, method, name) for method in others]
        rows.append([title_of(name), *(shown(one, name in SHARES) for one in found)])
    return aligned(rows)


def _difference(results: list[dict[str, Any]], method: str, name: str) -> Interval | None:
    values = {
        (r["method"], r["subject"], r["seed"]): r["measures"][name]
        for r in results
        if name in r["measures"]
    }
    by_subject: dict[str, list[float]] = {}
    for (kind, subject, seed), value in values.items():
        if kind == method and ("lora", subject, seed) in values:
            by_subject.setdefault(subject, []).append(value - values["lora", subject, seed])
    return cluster_interval(by_subject) if by_subject else None


def _mean_seconds(results: list[dict[str, Any]]) -> float:
    return sum(r["seconds"] for r in results) / max(1, len(results))


def runs_of(
    args: argparse.Namespace, subjects: Iterable[BenchmarkSubject], rates: dict[str, Any]
) -> list[Run]:
    """Every method on every subject with every seed, seed by seed."""
    runs = [
        Run(args.base, m, s.name, seed, rate, args.steps, args.prior, args.text_encoder)
        for seed in range(args.seeds)
        for s in subjects
        for m in args.methods
        for rate in (rates[m] if isinstance(rates[m], tuple) else (rates[m],))
    ]
    return runs if args.part is None else runs[args.part :: 2]


def chosen(
    args: argparse.Namespace, default: tuple[BenchmarkSubject, ...]
) -> tuple[BenchmarkSubject, ...]:
    """The subjects that were named, or the default."""
    return tuple(map(find_subject, args.subjects)) if args.subjects else default


def perform_all(runs: list[Run], work: Path, *, with_images: bool = False) -> list[dict[str, Any]]:
    """All runs in turn, with a line each."""
    results = []
    for number, run in enumerate(runs, 1):
        results.append(perform(run, work, with_image=with_images))
        figures = results[-1]["measures"]
        print(
            f"{number}/{len(runs)} {run.name}: similarity {figures['subject_similarity']:.3f}, "
            f"place {figures['background']:.2f}, others {figures['others_kind']:.2f}, "
            f"loss {figures['denoising_loss']:.4f}",
            flush=True,
        )
    return results


def tune(args: argparse.Namespace) -> None:
    """Print, per method and rate, what the tuning subjects came to."""
    args.methods = [m for m in args.methods if m in GRID]
    results = perform_all(runs_of(args, chosen(args, TUNING), GRID), args.work)
    if args.part is not None:
        return
    rows = [["method", "rate", *(title_of(name) for name in SHOWN)]]
    for method in args.methods:
        for rate in GRID[method]:
            mine = [r for r in results if (r["method"], r["learning_rate"]) == (method, rate)]
            cells = [shown(score(mine, name), name in SHARES) for name in SHOWN]
            rows.append([method, f"{rate:g}", *cells])
    print(aligned(rows))


def unpack(results: Path, work: Path) -> None:
    """Put the results of a file where `perform` finds them, unless it has its own."""
    for known in json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []:
        fields = {field.name: known[field.name] for field in dataclasses.fields(Run)}
        file = work / "runs" / f"{Run(**fields).name}.json"
        if not file.is_file():
            save_text(file, json.dumps(known, indent=2) + "\n")


def pack(base: str, work: Path, file: Path) -> None:
    """Write all results that there are on a base into one file, a line each."""
    known = [
        json.loads(one.read_text(encoding="utf-8"))
        for one in sorted((work / "runs").glob("*.json"))
    ]
    lines = ",\n".join(json.dumps(one) for one in known if one.get("digest") == digest_of(base))
    save_text(file, f"[\n{lines}\n]\n")


def image_grid(runs: Iterable[Run], work: Path) -> Image.Image:
    """The first seed's image of every subject in its first new place, under the truth."""
    rows: dict[str, list[Image.Image]] = {"truth": []}
    labels: dict[str, str] = {}
    for run in runs:
        if run.seed > 0:
            continue
        request = first_request(find_subject(run.subject))
        place = request.wanted["background"]
        if run.subject not in labels:
            labels[run.subject] = f"{run.subject} {PLACES[place][0]}"
            rows["truth"] += true_images([request], 128)
        rows.setdefault(run.method, []).append(Image.open(image_file(run, work, place)))
    return sheet(rows, list(labels.values()))


def main() -> None:
    """Tune or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder for photos and results.")
    parser.add_argument(
        "--base", default="embedded:tiny-sd", help="An embedded model, or a folder."
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--subjects", nargs="+", help="Names; default: all of their kind.")
    parser.add_argument("--seeds", type=int, default=8, help="Trainings per subject and method.")
    parser.add_argument("--steps", type=int, default=200, help="Optimizer steps of each.")
    parser.add_argument("--prior", action="store_true", help="With prior preservation.")
    parser.add_argument("--text_encoder", action="store_true", help="Adapt text encoders too.")
    parser.add_argument("--tune", action="store_true", help="Compare rates on tuning subjects.")
    parser.add_argument("--part", type=int, choices=(0, 1), help="Only every second run.")
    parser.add_argument("--results", type=Path, help="Start from this file, and rewrite it.")
    parser.add_argument("--grid", type=Path, help="Write images of every method here.")
    args = parser.parse_args()
    if args.results:
        unpack(args.results, args.work)
    torch.set_num_threads(1)
    if args.tune:
        tune(args)
        return
    runs = runs_of(args, chosen(args, REPORTED), RATES)
    results = perform_all(runs, args.work, with_images=args.grid is not None)
    if args.part is not None:
        return
    if args.results:
        pack(args.base, args.work, args.results)
    text = table(results, args.methods)
    if "lora" in args.methods:
        text += "\n\n" + differences(results, args.methods)
    save_text(args.work / "table.md", text + "\n")
    if args.grid:
        save_png(image_grid(runs, args.work), args.grid)
    print(f"{platform.processor() or platform.machine()}, one core, {args.base}\n\n{text}")


if __name__ == "__main__":
    main()
