"""Ranking of several adapters of one model by images of the same prompts and seeds.

The folder of a ranking::

    comparison.json   measurements, one row per checkpoint
    <name>.png        images of the subject, at fixed seeds
    <name>-others.png images of other classes, at fixed seeds
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from dora_diffusion.adapters.inject import remove_adapters
from dora_diffusion.adapters.state import attach_file
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo
from dora_diffusion.data.sheets import image_grid
from dora_diffusion.evaluation.denoising import NUM_SEEDS, HeldOutImages
from dora_diffusion.evaluation.measures import ScoredImage, Values, seed_means
from dora_diffusion.evaluation.photos import (
    PROMPTS,
    PhotoSubject,
    measure_photos,
    photo_requests,
    sample,
)
from dora_diffusion.evaluation.statistics import Interval, t_interval
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.runs import COMPARISON
from dora_diffusion.models.components import Components
from dora_diffusion.models.metric_models import LITE, open_metric_model
from dora_diffusion.models.words import add_tokens
from dora_diffusion.sampling.generate import BrokenImageError
from dora_diffusion.sampling.images import save_image
from dora_diffusion.sampling.settings import SamplingSettings

SEED, SUBJECTS, OTHERS = 0, 5, 6
_SHOWN_OTHERS, _SIDE = 3, 160
_COPYING = (
    "Similarity is measured to the training photos, so copying them also scores high; with "
    "held-out photos, 'dora-diffusion evaluate ADAPTER --base MODEL --subject PHOTOS' avoids that."
)

Images = Sequence[Image.Image]
R = TypeVar("R", bound=ScoredImage)


@dataclass(frozen=True)
class RankedCheckpoint:
    """Measurements of one checkpoint, or of the base model.

    Attributes:
        name: ``"checkpoint-N"``, ``"result"`` or ``"base"``.
        similarity: Mean similarity of its images to the subject; None if not measured.
        drift: Mean distance of images of other classes to the base's images of the same seeds.
        images: Image files of the subject and of other classes.
        similarities: Similarity of each image of the subjects, in the same order for every row.
        step: Optimizer steps, according to the run; 0 for the base.
        loss: Denoising loss on held-out photos; None without any.
    """

    name: str
    similarity: float | None
    drift: float | None
    images: tuple[Path, ...]
    similarities: tuple[float, ...] = ()
    step: int = 0
    loss: float | None = None

    def by_subject(self, count: int) -> list[float | None]:
        """Mean similarity of each of ``count`` subjects, which have the same number of images."""
        size = len(self.similarities) // count if count else 0
        slices = [self.similarities[index * size : (index + 1) * size] for index in range(count)]
        return [sum(values) / size if values else None for values in slices]


@dataclass(frozen=True)
class Ranking:
    """Result of a ranking.

    Attributes:
        rows: The base, then checkpoints by step, without deleted ones.
        missing: Newer checkpoints that the ranking does not include.
        notes: Explanations of the figures, and measures that are not available.
        similar_to: Short name of the reference photos of similarity.
        triggers: Trigger words of the subjects; figures are means over them.
    """

    rows: tuple[RankedCheckpoint, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    similar_to: str = ""
    triggers: tuple[str, ...] = ()

    def gain(self, row: RankedCheckpoint) -> Interval | None:
        """Return the gain in similarity to the subject over the base's images, paired by seed.

        Returns:
            The mean difference with its 95% confidence interval; None if not measured.
        """
        base = next((row for row in self.rows if not row.step), None)
        if base is None or not row.step or len(row.similarities) != len(base.similarities):
            return None
        if len(row.similarities) < 2:
            return None
        pairs = zip(row.similarities, base.similarities, strict=True)
        return t_interval([adapted - before for adapted, before in pairs])

    @property
    def suggested(self) -> str:
        """Name of the row with the highest similarity minus drift that has learned the subject.

        Empty if no row is significantly more similar than the base, or similarity is not measured.
        """
        scores = dict[str, float]()
        for row in self.rows:
            gain = self.gain(row)
            has_learned = gain is not None and gain.low is not None and gain.low > 0
            if has_learned and row.similarity is not None and row.drift is not None:
                scores[row.name] = row.similarity - row.drift
        return max(scores, key=lambda name: scores[name], default="")

    @property
    def verdict(self) -> str:
        """Message with the interval if no checkpoint has learned the subject; else empty."""
        gains = {row: gain for row in self.rows if (gain := self.gain(row)) is not None}
        if not gains or self.suggested:
            return ""
        best = max(gains, key=lambda row: gains[row].mean)
        gain = gains[best]
        return (
            "None of these checkpoints is more like the subject than the base model: the best, "
            f"step {best.step}, differs by {gain.mean:+.2f} (95% confidence interval "
            f"{gain.low:+.2f} to {gain.high:+.2f}, {gain.n} images). Train longer, raise "
            "learning_rate or rank, or check the photos and captions."
        )


def write_ranking(folder: Path, ranking: Ranking) -> Path:
    """Write comparison.json, which names the image files in the same folder."""
    text = json.dumps(asdict(ranking), indent=1, default=lambda path: path.name)
    return save_text(folder / COMPARISON, text)


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts of an evaluation, and the function that measures the images.

    Attributes:
        requests: Up to `SUBJECTS` requests of each subject, then up to `OTHERS` of other classes.
        settings: Sampling settings.
        judge: (images, the base's images) -> figures, named as by `measure_photos`.
        notes: Explanations of the figures.
        similar_to: Short name of the reference photos of similarity.
        held_out: Photos for the denoising loss.
        triggers: Trigger words of the subjects, which have the same number of images.
    """

    requests: Sequence[ScoredImage]
    settings: SamplingSettings
    judge: Callable[[Images, Images], Mapping[str, Values]]
    notes: tuple[str, ...]
    similar_to: str
    held_out: Sequence[Photo] = ()
    triggers: tuple[str, ...] = ()


def ask_photos(
    subjects: Sequence[PhotoSubject], settings: SamplingSettings, trained_on: Collection[str] = ()
) -> EvaluationPrompts:
    """Make the prompts for subjects known from training photos or held-out photos.

    Args:
        subjects: The subjects with their photos.
        settings: Sampling settings.
        trained_on: Trigger words of the subjects whose photos are training photos.
    """
    candidates = [
        photo_requests(subject.trigger, subject.class_word, [SEED], PROMPTS[:SUBJECTS])
        for subject in subjects
    ]
    # Prompts of other classes than the subjects'.
    shared = set.intersection(*({request.prompt for request in rs} for rs in candidates))
    selected = [
        few_requests([r for r in requests if r.group == "subject" or r.prompt in shared])
        for requests in candidates
    ]
    of_subject = [[r for r in requests if r.group == "subject"] for requests in selected]
    of_others = selected[0][len(of_subject[0]) :]
    model = open_metric_model(LITE)
    references = [[open_photo(photo.path) for photo in subject.photos] for subject in subjects]

    def judge(images: Images, base: Images) -> Mapping[str, Values]:
        combined: dict[str, Values] = {}
        start, rest = 0, sum(map(len, of_subject))
        for requests, photos in zip(of_subject, references, strict=True):
            end = start + len(requests)
            rows, base_rows = ([*all_[start:end], *all_[rest:]] for all_ in (images, base))
            start = end
            values = measure_photos([*requests, *of_others], rows, (), photos, [model], base_rows)
            for name, (value,) in values.items():
                earlier = combined.get(name, ((),))[0] if name.startswith("subject_") else ()
                combined[name] = ((*earlier, *value),)
        return combined

    notes = (*[_COPYING] * bool(trained_on), f"Both are measured by {model.name}.")
    held_out = [subject for subject in subjects if subject.trigger not in trained_on]
    folders = dict.fromkeys(subject.name for subject in held_out)
    names = [f"held-out photos in {', '.join(folders)}"] * bool(held_out)
    names += ["training photos"] * bool(trained_on)
    return EvaluationPrompts(
        [*itertools.chain(*of_subject), *of_others], settings, judge, notes, " and ".join(names),
        [photo for subject in held_out for photo in subject.photos],
        tuple(subject.trigger for subject in subjects),
    )  # fmt: skip


def few_requests(requests: Sequence[R]) -> list[R]:
    """Select a few requests of subject and other classes, which take about a minute to sample."""
    subject = [request for request in requests if request.group == "subject"]
    other = [request for request in requests if request.group == "others"]
    return subject[:SUBJECTS] + other[:OTHERS]


def rank(
    components: Components,
    adapters: Mapping[str, Path],
    questions: EvaluationPrompts,
    folder: Path,
    on_image: Callable[[int, int], None],
    base: str = "base",
) -> tuple[list[RankedCheckpoint], list[str]]:
    """Sample and measure images of the base and all adapters, and write them to a folder.

    Args:
        components: The base model.
        adapters: Name -> adapter file.
        questions: Prompts and measures.
        folder: Folder for the images.
        on_image: Called with (completed images, total images).
        base: Name of the base.

    Returns:
        Measurements, the base first, without adapters that produce NaN or black images; and notes.

    Raises:
        BrokenImageError: If the base produces NaN or black images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, notes = len(questions.requests), list(questions.notes)
    total = (1 + len(adapters)) * count
    photos = [open_photo(photo.path) for photo in questions.held_out]
    held_out = HeldOutImages(components, photos, [photo.caption for photo in questions.held_out])
    rows: list[RankedCheckpoint] = []
    base_images: Images = ()
    for index, name in enumerate((base, *adapters)):

        def on_step(step: int, steps: int, done: int = index * count) -> None:
            on_image(done + step * count // steps, total)

        try:
            with _adapter_on(components, adapters.get(name)):
                images = sample(
                    components, questions.requests, questions.settings, 4, on_step, finite=True
                )
                losses = held_out.losses_by_seed(range(NUM_SEEDS)) if photos else []
        except BrokenImageError as error:
            if name == base:
                raise
            notes.append(f"{name} was skipped: {error}.")
            continue
        base_images = base_images or images
        mean, similarities, drift = _figures(questions.judge(images, base_images))
        loss = float(np.mean(losses)) if losses else None
        strips = _write_strips(folder, name, images, questions.requests)
        rows.append(RankedCheckpoint(name, mean, drift, strips, similarities, loss=loss))
        on_image((index + 1) * count, total)
    return rows, notes


def _figures(
    values: Mapping[str, Values],
) -> tuple[float | None, tuple[float, ...], float | None]:
    """Mean similarity, similarity of each image, and mean change of other classes, for one seed."""
    named = {name.partition("@")[0]: value for name, value in values.items()}
    similarity, change = named.get("subject_similarity"), named.get("others_change")
    similarities = tuple(similarity[0]) if similarity else ()
    mean = float(np.mean(similarities)) if similarities else None
    return mean, similarities, seed_means(change)[0] if change else None


@contextmanager
def _adapter_on(components: Components, adapter: Path | None) -> Iterator[None]:
    """Attach an adapter to the model within the block; None: no adapter."""
    if adapter is not None:
        read = attach_file(components.adaptable(), adapter, family=components.family.name)
        add_tokens(components, read.tokens)
    try:
        yield
    finally:
        for model in components.adaptable().values():
            remove_adapters(model)


def _write_strips(
    folder: Path, name: str, images: Images, requests: Sequence[ScoredImage]
) -> tuple[Path, Path]:
    """Write strips of images of the subject and of other classes; enlarges small images."""

    def strip(file: str, row: Images) -> Path:
        side, smooth = (_SIDE, _SIDE), Image.Resampling.LANCZOS
        thumbnails = [ImageOps.contain(image, side, smooth) for image in row]
        grid = image_grid(thumbnails, columns=min(len(row), SUBJECTS), gap=4)
        return save_image(grid, folder / file)

    subjects = sum(request.group == "subject" for request in requests)
    other_images = images[subjects : subjects + _SHOWN_OTHERS]
    return strip(f"{name}.png", images[:subjects]), strip(f"{name}-others.png", other_images)
