"""Several adapters of one model, asked for the same few images at the same seeds.

The folder of a ranking::

    comparison.json   what was measured, one row per checkpoint
    <name>.png        the subject, at fixed seeds
    <name>-others.png other things, at fixed seeds
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
from dora_diffusion.evaluation.measures import ImageRequest, Values, seed_means
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
    "Similarity is to the photos that were trained on, so that copying them scores high too; on "
    "held-out photos, dora-diffusion evaluate measures it without that."
)

Images = Sequence[Image.Image]
R = TypeVar("R", bound=ImageRequest)


@dataclass(frozen=True)
class RankedCheckpoint:
    """One checkpoint, or the base model, as it was measured.

    Attributes:
        name: ``"checkpoint-N"``, ``"result"`` or ``"base"``.
        similarity: How like the subject its images are; None if that could not be measured.
        drift: How far other things have moved from the base's images of the same seeds.
        images: The subject, and other things.
        similarities: Of each image of the subjects, in the same order for every row.
        step: Optimizer steps; 0 is the base. It is the run that tells it, not the file.
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
        """Similarity of each of ``count`` subjects, which have as many images."""
        each = len(self.similarities) // count if count else 0
        parts = [self.similarities[at * each : (at + 1) * each] for at in range(count)]
        return [sum(part) / each if part else None for part in parts]


@dataclass(frozen=True)
class Ranking:
    """Result of a ranking.

    Attributes:
        rows: The base first, then checkpoints by step; those that are gone are left out.
        missing: Checkpoints that it does not cover, since they are newer.
        notes: What the figures are, and what could not be measured.
        similar_to: What similarity is to, in few words.
        triggers: Trigger words of each subject; the figures are means over them.
    """

    rows: tuple[RankedCheckpoint, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    similar_to: str = ""
    triggers: tuple[str, ...] = ()

    def gain(self, row: RankedCheckpoint) -> Interval | None:
        """Return the gain in similarity to the subject over the base's images, paired by seed.

        Returns:
            The mean difference with its 95% confidence interval; None if that was not measured.
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
        """The row of the highest similarity less drift among those that have learned the subject.

        Empty if none is more like the subject than the base, or if that was not measured.
        """
        scores = {
            row.name: row.similarity - row.drift
            for row in self.rows
            if row.similarity is not None and row.drift is not None and self._has_learned(row)
        }
        return max(scores, key=lambda name: scores[name], default="")

    def _has_learned(self, row: RankedCheckpoint) -> bool:
        gain = self.gain(row)
        return gain is not None and gain.low is not None and gain.low > 0

    @property
    def verdict(self) -> str:
        """Message that nothing was learned, with the interval; empty where something was."""
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
    """Write comparison.json; images are named there, and lie beside it."""
    text = json.dumps(asdict(ranking), indent=1, default=lambda path: path.name)
    return save_text(folder / COMPARISON, text)


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts of an evaluation, and how to judge the answers.

    Attributes:
        requests: `SUBJECTS` of each subject, then `OTHERS` of other things, or fewer.
        settings: How to sample.
        judge: (images, the base's images) -> figures, as `measure_photos` names them.
        notes: What the figures are.
        similar_to: What similarity is to, in few words.
        held_out: Photos whose denoising loss is taken too.
        triggers: Trigger words of each subject, of which as many images are asked for.
    """

    requests: Sequence[ImageRequest]
    settings: SamplingSettings
    judge: Callable[[Images, Images], Mapping[str, Values]]
    notes: tuple[str, ...]
    similar_to: str
    held_out: Sequence[Photo] = ()
    triggers: tuple[str, ...] = ()


def ask_photos(
    subjects: Sequence[PhotoSubject], settings: SamplingSettings, trained_on: Collection[str] = ()
) -> EvaluationPrompts:
    """Subjects that are known from photos alone, those that were trained on or held-out ones.

    Args:
        subjects: Each with its photos.
        settings: How to sample.
        trained_on: Trigger words of those whose photos were trained on.
    """
    every = [
        photo_requests(one.trigger, one.class_word, [SEED], PROMPTS[:SUBJECTS]) for one in subjects
    ]
    # Things that are of no subject's class.
    shared = set.intersection(*({request.prompt for request in of_one} for of_one in every))
    rounds = [
        few_requests([r for r in of_one if r.group == "subject" or r.prompt in shared])
        for of_one in every
    ]
    asked = [[r for r in of_one if r.group == "subject"] for of_one in rounds]
    others = rounds[0][len(asked[0]) :]
    model = open_metric_model(LITE)
    references = [[open_photo(photo.path) for photo in one.photos] for one in subjects]

    def judge(images: Images, base: Images) -> Mapping[str, Values]:
        found: dict[str, Values] = {}
        start, rest = 0, sum(map(len, asked))
        for of_one, photos in zip(asked, references, strict=True):
            end = start + len(of_one)
            mine, before = ([*of[start:end], *of[rest:]] for of in (images, base))
            start = end
            values = measure_photos([*of_one, *others], mine, (), photos, [model], before)
            for name, (value,) in values.items():
                kept = found.get(name, ((),))[0] if name.startswith("subject_") else ()
                found[name] = ((*kept, *value),)
        return found

    notes = (*[_COPYING] * bool(trained_on), f"Both are measured by {model.name}.")
    new = [one for one in subjects if one.trigger not in trained_on]
    names = [f"held-out photos in {', '.join(dict.fromkeys(one.name for one in new))}"] * bool(new)
    names += ["training photos"] * bool(trained_on)
    return EvaluationPrompts(
        [*itertools.chain(*asked), *others], settings, judge, notes, " and ".join(names),
        [photo for one in new for photo in one.photos], tuple(one.trigger for one in subjects),
    )  # fmt: skip


def few_requests(requests: Sequence[R]) -> list[R]:
    """Return some requests of the subject and of other things, to choose by in about a minute."""
    subject = [request for request in requests if request.group == "subject"]
    others = [request for request in requests if request.group == "others"]
    return subject[:SUBJECTS] + others[:OTHERS]


def rank(
    components: Components,
    adapters: Mapping[str, Path],
    questions: EvaluationPrompts,
    folder: Path,
    on_image: Callable[[int, int], None],
    base: str = "base",
) -> tuple[list[RankedCheckpoint], list[str]]:
    """Sample images of the base and every adapter, and write them into a folder.

    Args:
        components: The base model.
        adapters: Name -> adapter file.
        questions: What to ask.
        folder: Where the images go.
        on_image: Called with images done and in all.
        base: Name of the base.

    Returns:
        What was measured, the base first, without adapters that give NaN or black images; and
        notes.

    Raises:
        BrokenImageError: If the base gives such images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, notes = len(questions.requests), list(questions.notes)
    total = (1 + len(adapters)) * count
    photos = [open_photo(photo.path) for photo in questions.held_out]
    held_out = HeldOutImages(components, photos, [photo.caption for photo in questions.held_out])
    rows: list[RankedCheckpoint] = []
    before: Images = ()
    for place, name in enumerate((base, *adapters)):

        def on_step(step: int, steps: int, done: int = place * count) -> None:
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
        before = before or images
        mean, similarities, drift = _figures(questions.judge(images, before))
        loss = float(np.mean(losses)) if losses else None
        strips = _write_strips(folder, name, images, questions.requests)
        rows.append(RankedCheckpoint(name, mean, drift, strips, similarities, loss=loss))
        on_image((place + 1) * count, total)
    return rows, notes


def _figures(
    values: Mapping[str, Values],
) -> tuple[float | None, tuple[float, ...], float | None]:
    """Mean similarity, that of each image, and mean change of other things; of one seed."""
    named = {name.partition("@")[0]: value for name, value in values.items()}
    alike, change = named.get("subject_similarity"), named.get("others_change")
    each = tuple(alike[0]) if alike else ()
    mean = float(np.mean(each)) if each else None
    return mean, each, seed_means(change)[0] if change else None


@contextmanager
def _adapter_on(components: Components, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter, and without it again afterwards."""
    if adapter is not None:
        read = attach_file(components.adaptable(), adapter, family=components.family.name)
        add_tokens(components, read.tokens)
    try:
        yield
    finally:
        for model in components.adaptable().values():
            remove_adapters(model)


def _write_strips(
    folder: Path, name: str, images: Images, requests: Sequence[ImageRequest]
) -> tuple[Path, Path]:
    """The subject, and other things, each as a strip. Small images are enlarged."""

    def strip(file: str, shown: Images) -> Path:
        side, smooth = (_SIDE, _SIDE), Image.Resampling.LANCZOS
        thumbnails = [ImageOps.contain(image, side, smooth) for image in shown]
        grid = image_grid(thumbnails, columns=min(len(shown), SUBJECTS), gap=4)
        return save_image(grid, folder / file)

    subjects = sum(request.group == "subject" for request in requests)
    others = images[subjects : subjects + _SHOWN_OTHERS]
    return strip(f"{name}.png", images[:subjects]), strip(f"{name}-others.png", others)
