"""Measuring what a model has learned of a subject of the toy world, where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.evaluation.denoising import held_out_losses
from dora_diffusion.evaluation.judge import (
    JUDGED_SIZE,
    Judgement,
    judge,
    judged_pixels,
    similarity,
)
from dora_diffusion.evaluation.measures import TAKEN, Scores, Values, mean_distances
from dora_diffusion.evaluation.report import Evaluation
from dora_diffusion.evaluation.toy_requests import (
    GROUPS,
    Group,
    Request,
    reference_pictures,
    toy_requests,
    true_pictures,
)
from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.models.components import Components
from dora_diffusion.toy.benchmark_subjects import BenchmarkSubject
from dora_diffusion.toy.instrument import ATTRIBUTES, Instrument, load_instrument
from dora_diffusion.toy.pose import (
    SIDES,
    SIZES,
    Silhouette,
    follows,
    middle_size,
    silhouette,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLING = SamplingSettings(steps=25, guidance_scale=3.5)
"""How the embedded models are sampled for figures."""

_LOSS_MEASURES = {"subject": "denoising_loss", "others": "others_loss"}
_RELIABLE = 0.9
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """What one model made of n requests.

    Attributes:
        pictures: n pictures.
        losses: n denoising losses on the true pictures; None where none was computed.
    """

    pictures: list[Image]
    losses: list[float | None]


def answer(
    components: Components,
    requests: Sequence[Request],
    settings: SamplingSettings = SAMPLING,
    *,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> Answers:
    """Ask the model, with whatever adapters are on, for all pictures and losses."""
    pictures = generate_images(
        components,
        [request.prompt for request in requests],
        [request.seed for request in requests],
        settings,
        batch_size=batch_size,
        on_step=on_step,
    )
    asked = [request for request in requests if request.group in _LOSS_MEASURES]
    losses = held_out_losses(
        components,
        true_pictures(asked, components.default_resolution),
        [request.prompt for request in asked],
        [request.seed for request in asked],
    )
    found = iter(losses)
    return Answers(pictures, [next(found) if r.group in _LOSS_MEASURES else None for r in requests])


def true_answers(requests: Sequence[Request], size: int = JUDGED_SIZE) -> Answers:
    """The right answers: what a perfect model would have made, and the most that can be reached."""
    return Answers(true_pictures(requests, size), [None] * len(requests))


def measure(
    subject: BenchmarkSubject,
    requests: Sequence[Request],
    answers: Answers,
    *,
    base: Answers | None = None,
    instrument: Instrument | None = None,
) -> dict[str, Values]:
    """Judge one model's answers.

    Args:
        subject: Whose likeness it should have.
        requests: What was asked for.
        answers: What came.
        base: The base model's answers to the same requests, for the change of other classes.
        instrument: The judges; those of the package by default.

    Returns:
        Name of a measure -> values per round of seeds and picture. Measures that do not apply, such
        as the class of a subject whose class the judge does not know, are left out.

    Raises:
        ValueError: The answers are not as many as the requests.
    """
    instrument = instrument or _instrument()
    if len(answers.pictures) != len(requests):
        raise ValueError(f"{len(requests)} requests but {len(answers.pictures)} images")
    seen = judge(instrument, answers.pictures)
    cosines = similarity(seen.identity, _references(subject, instrument)).tolist()
    scores = Scores([request.group for request in requests], [r.round for r in requests])
    scores.add("subject_similarity", "subject", cosines)
    for name, value in _known_attributes(subject, instrument).items():
        scores.add(f"subject_{name}", "subject", [one == value for one in seen.answers[name]])
    scores.add("background", "subject", _as_wanted(requests, seen, "background"))
    _add_pose(scores, requests, seen)
    _add_diversity(scores, requests, seen)
    taken = [cosine > TAKEN for cosine in cosines]
    scores.add("class_kind", "class", _as_wanted(requests, seen, "kind"))
    scores.add("class_similarity", "class", cosines)
    scores.add("class_taken", "class", taken)
    for name in ("kind", "color", "background"):
        scores.add(f"others_{name}", "others", _as_wanted(requests, seen, name))
    scores.add("others_taken", "others", taken)
    if base is not None:
        before = judge(instrument, base.pictures).features
        change = (1 - (seen.features * before).sum(1)).clamp_min(0).tolist()
        scores.add("others_change", "others", change)
    for group, name in _LOSS_MEASURES.items():
        scores.add(name, group, answers.losses)
    return scores.values


@lru_cache(maxsize=1)
def _instrument() -> Instrument:
    return load_instrument()


def _references(subject: BenchmarkSubject, instrument: Instrument) -> Tensor:
    return judge(instrument, reference_pictures(subject, JUDGED_SIZE)).identity


def _as_wanted(requests: Sequence[Request], seen: Judgement, name: str) -> list[bool | None]:
    """Whether each picture shows what its prompt names; None where it names nothing."""
    wanted = [request.wanted.get(name) for request in requests]
    pairs = zip(wanted, seen.answers[name], strict=True)
    return [None if wish is None else wish == answer for wish, answer in pairs]


def _known_attributes(subject: BenchmarkSubject, instrument: Instrument) -> dict[str, str]:
    """The subject's attributes that have a name and that the judge reads off true pictures."""
    what = subject.sample.subject
    named = {"kind": what.kind, "color": what.color, "pattern": what.pattern}
    seen = judge(instrument, reference_pictures(subject, JUDGED_SIZE)).answers
    return {
        name: value
        for name, value in named.items()
        if value in ATTRIBUTES[name] and seen[name].count(value) >= _RELIABLE * len(seen[name])
    }


def _add_pose(scores: Scores, requests: Sequence[Request], seen: Judgement) -> None:
    """Side and size of the subject in the studio."""
    poses = [request for request in requests if request.group == "pose"]
    if not poses:
        return
    shapes: dict[str, list[Silhouette | None]] = {}
    truth = judged_pixels(true_pictures(poses, JUDGED_SIZE)) / 2 + 0.5
    for request, pixels in zip(poses, truth, strict=True):
        shapes.setdefault(request.pose, []).append(silhouette(pixels))
    middle = middle_size(shapes)
    if middle is None:
        return  # A subject without a colour is not seen in the studio.
    for name, words in (("side", SIDES), ("size", SIZES)):
        right = [
            follows(request.pose, silhouette(pixels), middle) if request.pose in words else None
            for request, pixels in zip(requests, seen.pixels, strict=True)
        ]
        scores.add(name, "pose", right)


def _add_diversity(scores: Scores, requests: Sequence[Request], seen: Judgement) -> None:
    if scores.has_several_rounds:
        keys = [(request.group, request.prompt) for request in requests]
        features = mean_distances(seen.features, keys, cosine=True)
        pixels = mean_distances(seen.pixels.flatten(1), keys, cosine=False)
        scores.add("diversity_features", "subject", features)
        scores.add("diversity_pixels", "subject", pixels)


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
) -> Evaluation:
    """Measure the adapters that are on the model, beside the base and the truth.

    Args:
        components: An embedded model with an adapter on it.
        subject: Whose likeness it should have learned.
        trigger: What calls it, such as "sks mug".
        seeds: One round of prompts each.
        settings: How to sample.
        groups: What to ask for.
        batch_size: Pictures at once.
        on_step: Called with (steps done, steps in all), for both models.

    Raises:
        ValueError: No seed.
    """
    if not seeds:
        raise ValueError("no seeds to evaluate with")
    requests = toy_requests(subject, trigger, seeds, groups)

    def ask(half: int) -> Answers:
        report = None
        if on_step is not None:
            report = lambda step, total: on_step(half * total + step, 2 * total)  # noqa: E731
        return answer(components, requests, settings, batch_size=batch_size, on_step=report)

    with disabled(*components.adaptable().values()):
        base = ask(0)
    adapted, truth = ask(1), true_answers(requests, components.default_resolution)
    by_name = {"base": base, "adapted": adapted, "truth": truth}
    shown = [row for row, r in enumerate(requests) if r.group != "pose" and r.round == 0]
    return Evaluation(
        subject=subject.name,
        columns={
            name: measure(subject, requests, answers, base=None if name == "truth" else base)
            for name, answers in by_name.items()
        },
        seeds=tuple(seeds),
        pictures={name: [a.pictures[row] for row in shown] for name, a in by_name.items()},
        labels=[requests[row].prompt.removeprefix("a photo of ") for row in shown],
    )
