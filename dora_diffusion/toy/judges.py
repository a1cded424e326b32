"""Evaluation in the toy world, where true images can be rendered, by judges trained on renders.

Requests for images of a subject, its class and other classes each have a true image. Measures
compare the generated images with the true ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.config import ConfigError
from dora_diffusion.config.wording import with_article
from dora_diffusion.data.sheets import center_square
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.evaluation.measures import LEAKAGE, ScoredImage, Scores, Values, similarities
from dora_diffusion.evaluation.photos import OnStep, base_and_adapted, first_round, sample
from dora_diffusion.evaluation.ranking import SEED, EvaluationPrompts, few_requests
from dora_diffusion.evaluation.report import Evaluation
from dora_diffusion.models.components import Components
from dora_diffusion.models.embedded import model_folder
from dora_diffusion.models.locate import is_embedded
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.benchmark_subjects import SUBJECTS, BenchmarkSubject, find_subject
from dora_diffusion.toy.instrument import (
    ATTRIBUTES,
    SIDES,
    SIZES,
    STUDIO,
    Instrument,
    Silhouette,
    follows,
    load_instrument,
    middle_size,
    silhouette,
)
from dora_diffusion.toy.shapes import CLASSES, EMBLEMS, RGB
from dora_diffusion.toy.world import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    PLACES,
    DrawnSubject,
    Emblem,
    Scene,
    render,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.cli.commands.evaluate import EvaluateSettings
    from dora_diffusion.training.inputs.subject import Subject


Group = Literal["subject", "pose", "class", "others"]
GROUPS: tuple[Group, ...] = ("subject", "pose", "class", "others")
SMALL, LARGE, ASIDE = 0.58, 0.82, 0.34
"""Sizes and distance from the centre for the words of captions."""

_TRUTH = 1000
_REFERENCES = 2000


@dataclass(frozen=True)
class ToyRequest(ScoredImage):
    """Request of the subject on a held-out background or in a pose, its class, or another class.

    Attributes:
        scene: Scene of a true image.
        wanted: Attribute -> value in the prompt.
        pose: Word for side or size, for the group ``"pose"``.
    """

    scene: Scene
    wanted: Mapping[str, str] = field(default_factory=dict)
    pose: str = ""


RequestParts = tuple[str, Scene, Mapping[str, str], str]
"""Prompt, scene, attributes and word of the pose of a `ToyRequest`."""


def toy_requests(
    subject: BenchmarkSubject, trigger: str, seeds: Sequence[int], groups: Sequence[Group] = GROUPS
) -> list[ToyRequest]:
    """Make all requests for each seed: subject on held-out backgrounds, poses, class, others.

    Args:
        subject: The subject.
        trigger: Trigger words, such as "sks mug".
        seeds: Seeds, one for each round of prompts.
        groups: Groups of requests.
    """
    requests = list[ToyRequest]()
    for number, seed in enumerate(seeds):
        for group in groups:
            first = 1000 * seed + 100 * GROUPS.index(group)
            parts = _GROUP_REQUESTS[group](subject, trigger, seed)
            requests += [
                ToyRequest(group, prompt, number, first + k, scene, attributes, pose)
                for k, (prompt, scene, attributes, pose) in enumerate(parts)
            ]
    return requests


def _photo_of(phrase: str, *details: str) -> str:
    return " ".join(["a photo of", with_article(phrase), *details])


def _subject(subject: BenchmarkSubject, trigger: str, seed: int) -> Iterator[RequestParts]:
    for background in subject.held_out_backgrounds:
        prompt = _photo_of(trigger, PLACES[background][0])
        scene = subject.sample.scene(background, _TRUTH + seed)
        yield prompt, scene, {"background": background}, ""


def _poses(subject: BenchmarkSubject, trigger: str, seed: int) -> Iterator[RequestParts]:
    view = subject.sample.scene(STUDIO, _TRUTH + seed)
    where = PLACES[STUDIO][0]
    plans = {
        "left": (_photo_of(trigger, "on the left", where), 0.62, -ASIDE),
        "right": (_photo_of(trigger, "on the right", where), 0.62, ASIDE),
        "small": (_photo_of(f"small {trigger}", where), SMALL, 0.0),
        "large": (_photo_of(f"large {trigger}", where), LARGE, 0.0),
    }
    for pose, (prompt, size, x) in plans.items():
        yield prompt, replace(view, size=size, position=(x, -0.1)), {}, pose


def _own_class(subject: BenchmarkSubject, trigger: str, seed: int) -> Iterator[RequestParts]:
    generator = np.random.default_rng((seed, 3))
    kind = subject.sample.subject.kind if subject.known_class else None
    for background in subject.held_out_backgrounds:
        scene = compose(sample_subject(generator, kind), background, generator)
        attributes = {"background": background} | ({"kind": kind} if kind else {})
        yield _photo_of(subject.word, PLACES[background][0]), scene, attributes, ""


def _others(subject: BenchmarkSubject, trigger: str, seed: int) -> Iterator[RequestParts]:
    """Yield each other class once, every second one with a colour; backgrounds rotate."""
    generator = np.random.default_rng((seed, 4))
    own_kind = subject.sample.subject.kind
    for number, kind in enumerate(name for name in CLASSES if name != own_kind):
        background = BACKGROUNDS[(3 * number + seed) % len(BACKGROUNDS)]
        drawn, color = sample_subject(generator, kind), ""
        if (number + seed) % 2:
            color = list(COLORS)[(7 * number + seed) % len(COLORS)]
            shade = _scaled(COLORS[color], 0.72)
            drawn = DrawnSubject(kind, COLORS[color], shade, color=color, accent_color=color)
        attributes = {"kind": kind, "background": background} | ({"color": color} if color else {})
        prompt = _photo_of(f"{color} {kind}".strip(), PLACES[background][0])
        yield prompt, compose(drawn, background, generator), attributes, ""


_GROUP_REQUESTS = {"subject": _subject, "pose": _poses, "class": _own_class, "others": _others}


def true_images(requests: Sequence[ToyRequest], size: int) -> list[Image]:
    """Render the true images of requests."""
    from PIL import Image

    return [Image.fromarray(render(request.scene, size)) for request in requests]


def reference_images(subject: BenchmarkSubject, size: int, views: int = 4) -> list[Image]:
    """Render true images of the subject on held-out backgrounds, in other views than requests."""
    from PIL import Image

    return [
        Image.fromarray(render(subject.sample.scene(background, _REFERENCES + view), size))
        for background in subject.held_out_backgrounds
        for view in range(views)
    ]


def sample_subject(generator: np.random.Generator, kind: str | None = None) -> DrawnSubject:
    """Draw a random object in palette colours, sometimes two-tone or with an emblem."""
    kind = kind or str(generator.choice(list(CLASSES)))
    color = str(generator.choice(list(COLORS)))
    body = _jitter(COLORS[color], generator)
    # Patterns are near-white on dark colours, near-black on light ones.
    is_light = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2] > 0.68
    subject = DrawnSubject(
        kind=kind,
        body=body,
        accent=_scaled(body, 0.72),
        pattern=PATTERNS[generator.choice(4, p=(0.46, 0.2, 0.2, 0.14))],
        pattern_rgb=(0.12, 0.12, 0.14) if is_light else (0.95, 0.95, 0.94),
        pattern_angle=float(generator.choice((0.0, 0.8))),
        color=color,
        accent_color=color,
    )
    extra = generator.random()
    other = str(generator.choice([name for name in COLORS if name != color]))
    other_rgb = _jitter(COLORS[other], generator)
    if extra < 0.15:
        return replace(subject, accent=other_rgb, accent_color=other)
    if extra < 0.25:
        drawn = replace(subject, two_tone=True, pattern="plain")
        return replace(drawn, accent=other_rgb, accent_color=other)
    if extra < 0.42:
        sign = Emblem(str(generator.choice(list(EMBLEMS))), other_rgb, other)
        return replace(subject, emblem=sign, pattern="plain")
    return subject


def compose(subject: DrawnSubject, background: str, generator: np.random.Generator) -> Scene:
    """Place a subject on a background in a random view."""
    size = generator.uniform(0.55, 0.85)
    room = 1.0 - size
    return Scene(
        subject=subject,
        background=background,
        size=float(size),
        position=(
            float(generator.uniform(-room, room)),
            float(generator.uniform(-room, 0.3 * room)),
        ),
        rotation=float(0.08 * generator.standard_normal()),
        flip=bool(generator.random() < 0.5),
        light=float(generator.uniform(0.7, 2.4)),
        seed=int(generator.integers(2**31)),
    )


def _jitter(color: RGB, generator: np.random.Generator) -> RGB:
    """Vary a colour slightly."""
    drawn = np.array(color) * generator.uniform(0.92, 1.06) + generator.uniform(-0.02, 0.02, 3)
    red, green, blue = np.clip(drawn, 0, 1).tolist()
    return (red, green, blue)


def _scaled(color: RGB, factor: float) -> RGB:
    return (factor * color[0], factor * color[1], factor * color[2])


JUDGED_SIZE = 64
SAMPLING = SamplingSettings(steps=25, guidance_scale=3.5)
"""Sampling settings for figures of the embedded models."""

_LOSS_MEASURES = {"subject": "denoising_loss", "others": "others_loss"}
_RELIABLE = 0.9
_instrument = lru_cache(maxsize=1)(load_instrument)


@dataclass(frozen=True)
class Answers:
    """Results of one model for n requests.

    Attributes:
        images: n images.
        losses: n denoising losses on the true images, None for groups without one; or empty.
    """

    images: Sequence[Image]
    losses: Sequence[float | None] = ()


def answer(
    components: Components,
    requests: Sequence[ToyRequest],
    settings: SamplingSettings = SAMPLING,
    *,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> Answers:
    """Sample all images and compute all losses with the model's current adapters."""
    images = sample(components, requests, settings, batch_size, on_step)
    with_loss = [request for request in requests if request.group in _LOSS_MEASURES]
    prompts = [request.prompt for request in with_loss]
    truth = HeldOutImages(
        components, true_images(with_loss, components.default_resolution), prompts
    )
    losses = iter(truth.losses([[request.seed for request in with_loss]])[0])
    return Answers(images, [next(losses) if r.group in _LOSS_MEASURES else None for r in requests])


def measure(
    subject: BenchmarkSubject,
    requests: Sequence[ToyRequest],
    answers: Answers,
    *,
    base: Answers | None = None,
) -> dict[str, Values]:
    """Measure one model's results.

    Args:
        subject: The subject.
        requests: The requests.
        answers: Results for the requests.
        base: The base model's results for the same requests, for the change of other classes.

    Returns:
        Name of a measure -> values by round of seeds and image. Measures that do not apply, such
        as the class of a subject whose class the judge does not know, are missing.

    Raises:
        ValueError: If the numbers of images and requests differ.
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
    scores.add("background", "subject", _matches_prompt(requests, judged, "background"))
    _add_pose(scores, requests, judged)
    scores.add_diversity("diversity_features", judged.features, cosine=True)
    scores.add_diversity("diversity_pixels", judged.pixels.flatten(1), cosine=False)
    shows_subject = [cosine > LEAKAGE for cosine in cosines]
    scores.add("class_kind", "class", _matches_prompt(requests, judged, "kind"))
    scores.add("class_similarity", "class", cosines)
    scores.add("class_leakage", "class", shows_subject)
    for name in ("kind", "color", "background"):
        scores.add(f"others_{name}", "others", _matches_prompt(requests, judged, name))
    scores.add("others_leakage", "others", shows_subject)
    if base is not None:
        scores.add_change("others_change", judged.features, judge(instrument, base.images).features)
    for group, name in _LOSS_MEASURES.items():
        scores.add(name, group, answers.losses or [None] * len(requests))
    return scores.values


def _matches_prompt(
    requests: Sequence[ToyRequest], judged: Judgement, name: str
) -> list[bool | None]:
    """Return whether each image has the attribute in its prompt; None for prompts without it."""
    expected = [request.wanted.get(name) for request in requests]
    pairs = zip(expected, judged.answers[name], strict=True)
    return [None if value is None else value == seen for value, seen in pairs]


def _known_attributes(subject: BenchmarkSubject, truth: Judgement) -> dict[str, str]:
    """Attributes of the subject that the judge recognizes reliably on true images."""
    drawn = subject.sample.subject
    named = {"kind": drawn.kind, "color": drawn.color, "pattern": drawn.pattern}
    return {
        name: value
        for name, value in named.items()
        if value in ATTRIBUTES[name]
        and truth.answers[name].count(value) >= _RELIABLE * len(truth.answers[name])
    }


def _add_pose(scores: Scores, requests: Sequence[ToyRequest], judged: Judgement) -> None:
    """Add the scores of the subject's side and size in the studio."""
    poses = [request for request in requests if request.group == "pose"]
    if not poses:
        return
    shapes: dict[str, list[Silhouette | None]] = {}
    truth = judged_pixels(true_images(poses, JUDGED_SIZE)) / 2 + 0.5
    for request, pixels in zip(poses, truth, strict=True):
        shapes.setdefault(request.pose, []).append(silhouette(pixels))
    middle = middle_size(shapes)
    if middle is None:
        return  # A subject without a colour is not detected in the studio.
    for name, words in (("side", SIDES), ("size", SIZES)):
        right = [
            follows(request.pose, silhouette(pixels), middle) if request.pose in words else None
            for request, pixels in zip(requests, judged.pixels, strict=True)
        ]
        scores.add(name, "pose", right)


def evaluate_toy(  # noqa: PLR0913 - keywords, each documented
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
    """Evaluate the adapters on a model, with the base and the truth for comparison.

    Args:
        components: An embedded model with an adapter attached.
        subject: Subject of the adapter.
        trigger: Trigger words, such as "sks mug".
        seeds: Seeds, one for each round of prompts.
        settings: Sampling settings.
        groups: Groups of requests.
        batch_size: Images per batch.
        on_step: Called with (completed steps, total steps), over both models.
        base_model: Base model of a fully fine-tuned model.

    Raises:
        ValueError: If there are no seeds.
    """
    requests = toy_requests(subject, trigger, seeds, groups)

    def ask(report: OnStep | None) -> Answers:
        return answer(components, requests, settings, batch_size=batch_size, on_step=report)

    answers = base_and_adapted(components, ask, seeds, on_step, base_model)
    base = answers["base"]
    answers["truth"] = Answers(true_images(requests, components.default_resolution))
    return Evaluation(
        subject=subject.name,
        columns={
            name: measure(subject, requests, a, base=None if name == "truth" else base)
            for name, a in answers.items()
        },
        seeds=tuple(seeds),
        **first_round(requests, {name: a.images for name, a in answers.items()}, {"pose"}),
    )


def knows_toy_world(base: str) -> bool:
    """Return whether a model is embedded, or a folder with the vocabulary of one."""
    vocabulary, embedded_vocabulary = (
        folder / "tokenizer" / "vocab.json"
        for folder in (Path(base).expanduser(), model_folder("tiny-sd"))
    )
    return is_embedded(base) or (
        vocabulary.is_file() and vocabulary.read_bytes() == embedded_vocabulary.read_bytes()
    )


def ask_toy(sample: str, trigger: str, settings: SamplingSettings) -> EvaluationPrompts:
    """Make the prompts for a subject of the toy world, whose true images are known."""
    subject = find_subject(sample)
    requests = few_requests(toy_requests(subject, trigger, [SEED], ("subject", "others")))

    def judge(images: Sequence[Image], base: Sequence[Image]) -> dict[str, Values]:
        return measure(subject, requests, Answers(images), base=Answers(base))

    note = "Similarity is measured to true images of the subject on held-out backgrounds."
    return EvaluationPrompts(requests, settings, judge, (note,), "the true subject", (), (trigger,))


@dataclass(frozen=True)
class KnownSubject:
    """Subject of the toy world as a `cli.commands.evaluate.SubjectSource`."""

    guidance_scale: ClassVar = SAMPLING.guidance_scale
    subject: BenchmarkSubject

    def check(self, args: EvaluateSettings) -> None:
        for name in ("metric_model", "prompts"):
            if getattr(args, name):
                raise ConfigError(
                    f"--{name} is for photos; {self.subject.name} is a subject of the toy world"
                )

    def measure(
        self, args: EvaluateSettings, trigger: str, captions: str
    ) -> Callable[..., Evaluation]:
        if not knows_toy_world(args.base):
            warnings.warn(
                f"{self.subject.name} is a subject of the toy world; its judges only know images "
                "of the embedded models",
                stacklevel=1,
            )
        trigger = trigger or f"sks {self.subject.word}"
        return partial(evaluate_toy, subject=self.subject, trigger=trigger)

    def questions(
        self, subjects: Sequence[Subject], settings: SamplingSettings, base: str
    ) -> EvaluationPrompts:
        if not knows_toy_world(base):
            raise ConfigError(
                f"{self.subject.name} is of the toy world, which {base} does not know"
            )
        return ask_toy(self.subject.name, subjects[0].trigger, settings)


KNOWN: Mapping[str, KnownSubject] = {name: KnownSubject(one) for name, one in SUBJECTS.items()}
"""Subjects that `evaluate` and `rank-checkpoints` accept by name."""


@dataclass(frozen=True)
class Judgement:
    """Verdict of the judges on n images.

    Attributes:
        pixels: ``(n, 3, 64, 64)`` in [0, 1].
        identity: ``(n, d)`` unit vectors: similar for the same subject on any background.
        features: ``(n, d)`` unit vectors: similar for similar images.
        answers: Attribute ("kind", "color", "pattern", "background") -> n values.
    """

    pixels: Tensor
    identity: Tensor
    features: Tensor
    answers: dict[str, list[str]]


def judged_pixels(images: Sequence[Image]) -> Tensor:
    """Resize the centre squares of images to (n, 3, 64, 64) in [-1, 1].

    Raises:
        ValueError: If there are no images.
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
        ValueError: If there are no images.
    """
    pixels = judged_pixels(images)
    logits = instrument.classifier(pixels)
    answers = {
        name: [ATTRIBUTES[name][choice] for choice in logits[name].argmax(1).tolist()]
        for name in ATTRIBUTES
    }
    features = F.normalize(instrument.classifier.trunk(pixels), dim=1)
    return Judgement((pixels + 1) / 2, instrument.embedder(pixels), features, answers)
