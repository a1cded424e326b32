"""Measures of what a model has learned of a subject of the toy world, where the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.data.sheets import center_square
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.evaluation.measures import LEAKAGE, Scores, Values, similarities
from dora_diffusion.evaluation.photos import OnStep, base_and_adapted, first_round, sample
from dora_diffusion.evaluation.ranking import SEED, EvaluationPrompts, few_requests
from dora_diffusion.evaluation.report import Evaluation
from dora_diffusion.lab.judges.requests import (
    GROUPS,
    Group,
    ToyRequest,
    reference_images,
    toy_requests,
    true_images,
)
from dora_diffusion.lab.toy.benchmark_subjects import BenchmarkSubject, find_subject
from dora_diffusion.lab.toy.instrument import (
    ATTRIBUTES,
    SIDES,
    SIZES,
    Instrument,
    Silhouette,
    follows,
    load_instrument,
    middle_size,
    silhouette,
)
from dora_diffusion.models.components import Components
from dora_diffusion.sampling.generate import SamplingSettings

if TYPE_CHECKING:
    from PIL.Image import Image


JUDGED_SIZE = 64
SAMPLING = SamplingSettings(steps=25, guidance_scale=3.5)
"""Sampling settings for figures of the embedded models."""

_LOSS_MEASURES = {"subject": "denoising_loss", "others": "others_loss"}
_RELIABLE = 0.9
_instrument = lru_cache(maxsize=1)(load_instrument)


@dataclass(frozen=True)
class Answers:
    """Answers of one model to n requests.

    Attributes:
        images: n images.
        losses: n denoising losses on the true images; None where none was computed.
    """

    images: list[Image]
    losses: list[float | None]


def answer(
    components: Components,
    requests: Sequence[ToyRequest],
    settings: SamplingSettings = SAMPLING,
    *,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> Answers:
    """Sample all images and compute all losses of the model, with whatever adapters are on."""
    images = sample(components, requests, settings, batch_size, on_step)
    asked = [request for request in requests if request.group in _LOSS_MEASURES]
    prompts = [request.prompt for request in asked]
    truth = HeldOutImages(components, true_images(asked, components.default_resolution), prompts)
    taken = iter(truth.losses([[request.seed for request in asked]])[0])
    return Answers(images, [next(taken) if r.group in _LOSS_MEASURES else None for r in requests])


def true_answers(requests: Sequence[ToyRequest], size: int = JUDGED_SIZE) -> Answers:
    """The right answers: what a perfect model would have made, and the most that can be reached."""
    return Answers(true_images(requests, size), [None] * len(requests))


def measure(
    subject: BenchmarkSubject,
    requests: Sequence[ToyRequest],
    answers: Answers,
    *,
    base: Answers | None = None,
) -> dict[str, Values]:
    """Judge one model's answers.

    Args:
        subject: What it should show.
        requests: What was asked for.
        answers: What came.
        base: The base model's answers to the same requests, for the change of other classes.

    Returns:
        Name of a measure -> values per round of seeds and image. Measures that do not apply, such
        as the class of a subject whose class the judge does not know, are left out.

    Raises:
        ValueError: The answers are not as many as the requests.
    """
    if len(answers.images) != len(requests):
        raise ValueError(f"{len(requests)} requests but {len(answers.images)} images")
    instrument = _instrument()
    judged = judge(instrument, answers.images)
    truth = judge(instrument, reference_images(subject, JUDGED_SIZE))
    cosines = similarities(judged.identity, truth.identity)
    scores = Scores(requests)
    scores.add("subject_similarity", "subject", cosines)
    for name, value in _known_attributes(subject, truth).items():
        scores.add(f"subject_{name}", "subject", [seen == value for seen in judged.answers[name]])
    scores.add("background", "subject", _as_wanted(requests, judged, "background"))
    _add_pose(scores, requests, judged)
    scores.add_diversity("diversity_features", judged.features, cosine=True)
    scores.add_diversity("diversity_pixels", judged.pixels.flatten(1), cosine=False)
    shows_subject = [cosine > LEAKAGE for cosine in cosines]
    scores.add("class_kind", "class", _as_wanted(requests, judged, "kind"))
    scores.add("class_similarity", "class", cosines)
    scores.add("class_leakage", "class", shows_subject)
    for name in ("kind", "color", "background"):
        scores.add(f"others_{name}", "others", _as_wanted(requests, judged, name))
    scores.add("others_leakage", "others", shows_subject)
    if base is not None:
        scores.add_change("others_change", judged.features, judge(instrument, base.images).features)
    for group, name in _LOSS_MEASURES.items():
        scores.add(name, group, answers.losses)
    return scores.values


def _as_wanted(requests: Sequence[ToyRequest], judged: Judgement, name: str) -> list[bool | None]:
    """Return whether each image shows what its prompt names; None where it names nothing."""
    wanted = [request.wanted.get(name) for request in requests]
    pairs = zip(wanted, judged.answers[name], strict=True)
    return [None if wish is None else wish == answer for wish, answer in pairs]


def _known_attributes(subject: BenchmarkSubject, truth: Judgement) -> dict[str, str]:
    """The subject's attributes that have a name and that the judge reads off true images."""
    what = subject.sample.subject
    named = {"kind": what.kind, "color": what.color, "pattern": what.pattern}
    return {
        name: value
        for name, value in named.items()
        if value in ATTRIBUTES[name]
        and truth.answers[name].count(value) >= _RELIABLE * len(truth.answers[name])
    }


def _add_pose(scores: Scores, requests: Sequence[ToyRequest], judged: Judgement) -> None:
    """Side and size of the subject in the studio."""
    poses = [request for request in requests if request.group == "pose"]
    if not poses:
        return
    shapes: dict[str, list[Silhouette | None]] = {}
    truth = judged_pixels(true_images(poses, JUDGED_SIZE)) / 2 + 0.5
    for request, pixels in zip(poses, truth, strict=True):
        shapes.setdefault(request.pose, []).append(silhouette(pixels))
    middle = middle_size(shapes)
    if middle is None:
        return  # A subject without a colour is not seen in the studio.
    for name, words in (("side", SIDES), ("size", SIZES)):
        right = [
            follows(request.pose, silhouette(pixels), middle) if request.pose in words else None
            for request, pixels in zip(requests, judged.pixels, strict=True)
        ]
        scores.add(name, "pose", right)


def evaluate_toy(
    components: Components,
    subject: BenchmarkSubject,
    trigger: str,
    seeds: Sequence[int],
    settings: SamplingSettings = SAMPLING,
    *,
    groups: Sequence[Group] = GROUPS,
    batch_size: int = 8,
    on_step: OnStep | None = None,
    base_model: Components | None = None,
) -> Evaluation:
    """Measure the adapters that are on the model, beside the base and the truth.

    Args:
        components: An embedded model with an adapter on it.
        subject: What it should have learned.
        trigger: Trigger words, such as "sks mug".
        seeds: One round of prompts each.
        settings: How to sample.
        groups: What to ask for.
        batch_size: Images at once.
        on_step: Called with (steps done, steps in all), for both models.
        base_model: What it was trained from, of a model that was trained whole.

    Raises:
        ValueError: No seed.
    """
    requests = toy_requests(subject, trigger, seeds, groups)

    def ask(report: OnStep | None) -> Answers:
        return answer(components, requests, settings, batch_size=batch_size, on_step=report)

    answers = base_and_adapted(components, ask, seeds, on_step, base_model)
    base = answers["base"]
    answers["truth"] = true_answers(requests, components.default_resolution)
    return Evaluation(
        subject=subject.name,
        columns={
            name: measure(subject, requests, a, base=None if name == "truth" else base)
            for name, a in answers.items()
        },
        seeds=tuple(seeds),
        **first_round(requests, {name: a.images for name, a in answers.items()}, {"pose"}),
    )


def ask_toy(sample: str, trigger: str, settings: SamplingSettings) -> EvaluationPrompts:
    """A subject of the toy world: its true images are known."""
    subject = find_subject(sample)
    requests = few_requests(toy_requests(subject, trigger, [SEED], ("subject", "others")))

    def judge(images: Sequence[Image], base: Sequence[Image]) -> dict[str, Values]:
        answers, before = (Answers(list(of), [None] * len(requests)) for of in (images, base))
        return measure(subject, requests, answers, base=before)

    note = "Similarity is to true images of the subject on held-out backgrounds."
    return EvaluationPrompts(requests, settings, judge, (note,), "the true subject", (), (trigger,))


@dataclass(frozen=True)
class Judgement:
    """Verdict of the judges on n images.

    Attributes:
        pixels: ``(n, 3, 64, 64)`` in [0, 1].
        identity: ``(n, d)`` unit vectors: alike for one subject wherever it is.
        features: ``(n, d)`` unit vectors: alike for images that look alike.
        answers: Attribute ("kind", "color", "pattern", "background") -> n values.
    """

    pixels: Tensor
    identity: Tensor
    features: Tensor
    answers: dict[str, list[str]]


def judged_pixels(images: Sequence[Image]) -> Tensor:
    """Images of any size -> (n, 3, 64, 64) in [-1, 1], from the centre square.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("no images to judge")
    squares = []
    for image in images:
        square = center_square(image)
        if square.width != JUDGED_SIZE:
            square = square.resize((JUDGED_SIZE, JUDGED_SIZE), resample=4)  # PIL's BOX: the mean
        squares.append(np.asarray(square, np.float32))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def judge(instrument: Instrument, images: Sequence[Image]) -> Judgement:
    """Judge images.

    Raises:
        ValueError: there is no image.
    """
    pixels = judged_pixels(images)
    logits = instrument.classifier(pixels)
    answers = {
        name: [ATTRIBUTES[name][choice] for choice in logits[name].argmax(1).tolist()]
        for name in ATTRIBUTES
    }
    features = F.normalize(instrument.classifier.trunk(pixels), dim=1)
    return Judgement((pixels + 1) / 2, instrument.embedder(pixels), features, answers)
