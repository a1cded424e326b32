"""``dora-diffusion rank-checkpoints``: fixed-seed images, judged as ``evaluate`` judges them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.commands.options import add_base, add_overwrite, base_options
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.console.progress import progress, tell
from dora_diffusion.formats.files.atomic import require_writable
from dora_diffusion.jobs.base_model import ModelFiles
from dora_diffusion.jobs.checkpoints import (
    BASE_NAME,
    COMPARISON,
    RESULT_NAME,
    RankedCheckpoint,
    Ranking,
    adapter_checkpoints,
    candidates,
    result_adapter,
    write_ranking,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.generate import SamplingSettings
    from dora_diffusion.models.components import Components

    Figures = tuple[list[float] | None, float | None]

SEED, SUBJECTS, OTHERS = 0, 5, 6
_SHOWN_OTHERS, _SIDE = 3, 160
_COPYING = (
    "Similarity is to the photos that were trained on, so that copying them scores high too; on "
    "held-out photos, `dora-diffusion evaluate` measures it without that."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("run", type=Path, help="The output folder of a run.")
    add_base(parser, required=False)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="NAME",
        help=f"Such as checkpoint-100, or {RESULT_NAME}. Default: up to eight, spread over the "
        "run, and its result.",
    )
    parser.add_argument(
        "--subject",
        help="Folder of photos to be similar to; or, for an embedded model, a subject of the toy "
        "world such as bolt_mug. Default: the photos that were trained on.",
    )
    parser.add_argument("--output", type=Path, default="ranking", help="Folder of the results.")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the base and every checkpoint for the same images, measure them, and suggest one."""
    if (args.output / COMPARISON).exists() and not args.overwrite:
        raise ConfigError(
            f"{args.output} holds a ranking already; choose another --output, or --overwrite"
        )
    require_writable(args.output, is_folder=True)
    config = TrainConfig.from_dict(read_config_file(args.run / "config.yaml"))
    adapters = _adapters(args.run, args.checkpoints)
    if args.base is None:
        args.base = config.pretrained_model_name_or_path
        args.variant = args.variant or config.variant
        args.revision = args.revision or config.revision
    questions = _questions(config, args)
    tell(phase="loading the model")
    from dora_diffusion.jobs.image_generator import load_model

    chosen: dict[str, Any] = {**base_options(args)}
    files = replace(ModelFiles.of(config.to_dict()), **chosen)
    components = load_model(args.base, None, files)
    with progress("generating images", "image") as show:
        rows, notes = rank(components, adapters, questions, args.output, show)
    write_ranking(args.output, rows, notes, questions.similar_to)
    _print(Ranking(tuple(rows), (), tuple(notes), questions.similar_to))
    print(args.output)
    return 0


def _adapters(run: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Adapter files by the names of their checkpoints.

    Raises:
        ConfigError: If one of the names is none, or there are none.
    """
    kept, result = adapter_checkpoints(run), result_adapter(run)
    if not names:
        names = candidates(kept, None if result is None else _steps(RESULT_NAME, result))
    places = {name: result_adapter(run / name) for name in kept} | {RESULT_NAME: result}
    lacking = [name for name in names if places.get(name) is None]
    if lacking or not names:
        what = ", ".join(lacking) or "any adapter"
        raise ConfigError(f"{run} has not {what}; it has {', '.join(kept) or 'no checkpoint'}")
    return {name: path for name in names if (path := places[name])}


def _steps(name: str, adapter: Path) -> int:
    """Steps that an adapter was trained for, as its name or its file says."""
    from dora_diffusion.formats.adapter.inspect import report_on

    if name != RESULT_NAME:
        return int(name.removeprefix("checkpoint-"))
    return int(report_on(adapter).metadata.extra.get("training_steps", 1))


@dataclass(frozen=True)
class EvaluationPrompts:
    """What to ask for, and how to judge the answers.

    Attributes:
        requests: `SUBJECTS` of the subject, then `OTHERS` of other things, or fewer.
        settings: How to sample.
        judge: (images, the base's images) -> similarity of each image of the subject, and drift;
            None is not measured.
        notes: What the figures are.
        similar_to: What similarity is to, in few words.
    """

    requests: Sequence[Any]
    settings: SamplingSettings
    judge: Callable[[Sequence[Image], Sequence[Image]], Figures]
    notes: tuple[str, ...]
    similar_to: str


def _questions(config: TrainConfig, args: argparse.Namespace) -> EvaluationPrompts:
    """What to ask about a run's subject, sampled as the run's own samples are.

    The truth of a subject of the toy world is known; others have photos.
    """
    from dora_diffusion.generate import SamplingSettings
    from dora_diffusion.models.locate import is_embedded
    from dora_diffusion.toy.benchmark_subjects import SUBJECTS as TOY
    from dora_diffusion.training.subject import subject_of

    settings = SamplingSettings(
        steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        width=config.resolution,
        height=config.resolution,
    )
    subject = subject_of(config)
    if args.subject in TOY:
        if not is_embedded(args.base):
            raise ConfigError(
                f"{args.subject} is of the toy world, which {args.base} does not know"
            )
        return ask_toy(args.subject, subject.trigger, settings)
    own = Path(config.instance_data_dir or "")
    photos = own if args.subject is None else Path(args.subject)
    trained_on = photos.resolve() == own.resolve()
    return ask_photos(photos, subject.trigger, subject.class_word, settings, trained_on=trained_on)


def ask_toy(sample: str, trigger: str, settings: SamplingSettings) -> EvaluationPrompts:
    """A subject of the toy world: its true images are known."""
    from dora_diffusion.evaluation.toy.evaluate import Answers, measure
    from dora_diffusion.evaluation.toy.requests import toy_requests
    from dora_diffusion.toy.benchmark_subjects import find_subject

    subject = find_subject(sample)
    requests = _few(toy_requests(subject, trigger, [SEED], ("subject", "others")))

    def judge(images: Sequence[Image], base: Sequence[Image]) -> Figures:
        answers, before = (Answers(list(of), [None] * len(requests)) for of in (images, base))
        values = measure(subject, requests, answers, base=before)
        return _figures(values, "subject_similarity", "others_change")

    note = "Similarity is to true images of the subject on held-out backgrounds."
    return EvaluationPrompts(requests, settings, judge, (note,), "the true subject")


def ask_photos(
    folder: Path,
    trigger: str,
    class_word: str,
    settings: SamplingSettings,
    *,
    trained_on: bool = True,
) -> EvaluationPrompts:
    """A subject that is known from photos alone, those that were trained on or others."""
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.data.photos import list_photos
    from dora_diffusion.evaluation.metric_models import LITE, open_metric_model
    from dora_diffusion.evaluation.photos import PROMPTS, measure_photos, photo_requests

    requests = _few(photo_requests(trigger, class_word, [SEED], PROMPTS[:SUBJECTS]))
    model = open_metric_model(LITE)
    references = [open_photo(path) for path in list_photos(folder)]

    def judge(images: Sequence[Image], base: Sequence[Image]) -> Figures:
        values = measure_photos(requests, images, (), references, [model], base)
        at = f"@{model.name}"
        return _figures(values, f"subject_similarity{at}", f"others_change{at}")

    notes = (*[_COPYING] * trained_on, f"Both are measured by {model.name}.")
    similar_to = "training photos" if trained_on else f"photos in {folder.name}"
    return EvaluationPrompts(requests, settings, judge, notes, similar_to)


def _few(requests: Sequence[Any]) -> list[Any]:
    """Some of the subject and some of other things: enough to choose by, in a minute or so."""
    subject = [request for request in requests if request.group == "subject"]
    others = [request for request in requests if request.group == "others"]
    return subject[:SUBJECTS] + others[:OTHERS]


def _figures(values: Mapping[str, Any], similarity: str, drift: str) -> Figures:
    """A similarity of each image, in the order of the requests, and a mean; of the one seed."""
    from dora_diffusion.evaluation.measures import seed_means

    alike, change = values.get(similarity), values.get(drift)
    each = [float(value) for value in alike[0]] if alike else None
    return each, seed_means(change)[0] if change else None


def rank(
    components: Components,
    adapters: Mapping[str, Path],
    questions: EvaluationPrompts,
    folder: Path,
    on_image: Callable[[int, int], None],
) -> tuple[list[RankedCheckpoint], list[str]]:
    """Ask the base and every adapter, and write their images into a folder.

    Args:
        components: The base model.
        adapters: Name -> adapter file.
        questions: What to ask.
        folder: Where the images go.
        on_image: Called with images done and in all.

    Returns:
        The rows of the ranking, without adapters that give NaN or black images, and its notes.

    Raises:
        BrokenImageError: If the base gives such images.
    """
    from dora_diffusion.generate import BrokenImageError, generate_images

    folder.mkdir(parents=True, exist_ok=True)
    count = len(questions.requests)
    total = (1 + len(adapters)) * count
    prompts = [request.prompt for request in questions.requests]
    seeds = [request.seed for request in questions.requests]
    subjects = sum(request.group == "subject" for request in questions.requests)
    rows: list[RankedCheckpoint] = []
    notes: list[str] = list(questions.notes)
    before: list[Image] = []
    for place, name in enumerate((BASE_NAME, *adapters)):

        def on_step(step: int, steps: int, done: int = place * count) -> None:
            on_image(done + step * count // steps, total)

        try:
            with _adapter_on(components, adapters.get(name)):
                images = generate_images(
                    components, prompts, seeds, questions.settings,
                    on_step=on_step, require_finite=True,
                )  # fmt: skip
        except BrokenImageError as error:
            if name == BASE_NAME:
                raise
            notes.append(f"{name} was left out: {error}.")
            continue
        before = before or images
        each, drift = questions.judge(images, before)
        similarity = sum(each) / len(each) if each else None
        strips = _write_strips(folder, name, images, subjects)
        step = _steps(name, adapters[name]) if name in adapters else 0
        rows.append(RankedCheckpoint(name, similarity, drift, strips, tuple(each or ()), step))
        on_image((place + 1) * count, total)
    return rows, notes


@contextmanager
def _adapter_on(components: Components, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter, and without it again afterwards."""
    from dora_diffusion.adapters.inject import remove_adapters
    from dora_diffusion.adapters.state import load_adapter

    if adapter is not None:
        load_adapter(components.adaptable(), adapter, family=components.family.name)
    try:
        yield
    finally:
        for model in components.adaptable().values():
            remove_adapters(model)


def _write_strips(
    folder: Path, name: str, images: Sequence[Image], subjects: int
) -> tuple[Path, Path]:
    """The subject, and other things, each as a strip. Small images are enlarged."""
    from PIL import Image, ImageOps

    from dora_diffusion.generate import image_grid
    from dora_diffusion.images import save_png

    def strip(file: str, shown: Sequence[Image.Image]) -> Path:
        thumbnails = [
            ImageOps.contain(image, (_SIDE, _SIDE), Image.Resampling.LANCZOS) for image in shown
        ]
        return save_png(image_grid(thumbnails, columns=len(shown), gap=4), folder / file)

    others = images[subjects : subjects + _SHOWN_OTHERS]
    return strip(f"{name}.png", images[:subjects]), strip(f"{name}-others.png", others)


def _print(ranking: Ranking) -> None:
    """The figures as a table, what they are, and what is suggested."""
    from dora_diffusion.evaluation.report import aligned

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    table = [["checkpoint", f"similarity to {ranking.similar_to}", "drift"]]
    table += [[row.name, shown(row.similarity), shown(row.drift)] for row in ranking.rows]
    print(aligned(table))
    for line in (*ranking.notes, ranking.verdict):
        print(line, end="\n" if line else "")
    if ranking.suggested:
        print(f"suggested: {ranking.suggested}")
