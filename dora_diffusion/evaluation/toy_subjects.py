"""How well a model has learned a sample subject, measured where its photos never showed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_diffusion.embedded.instrument import ATTRIBUTES, Instrument
from dora_diffusion.embedded.samples import NEW_BACKGROUNDS, SampleSubject
from dora_diffusion.embedded.world import render
from dora_diffusion.evaluation.judge import JUDGED_SIZE, judge_prompt, subject_similarity

if TYPE_CHECKING:
    from PIL.Image import Image

Generate = Callable[[str, int, int], "list[Image]"]
"""(prompt, seed, count) -> pictures."""

TRUTH_SEED = 1000


@dataclass(frozen=True)
class SubjectScore:
    """What came out.

    Attributes:
        similarity: mean cosine of generated pictures to true renders in the same places.
        ceiling: the same of other true renders, the most that can be reached.
        background_accuracy: how often the place is the one asked for.
        class_accuracy: how often the class is right; None when the judge does not know it.
        pictures: how many were judged.
    """

    similarity: float
    ceiling: float
    background_accuracy: float
    class_accuracy: float | None
    pictures: int


def true_pictures(
    sample: SampleSubject, background: str, count: int, seed: int = TRUTH_SEED
) -> list[Image]:
    """Renders of the subject in a place, in views that no photo shows."""
    from PIL import Image

    return [
        Image.fromarray(render(sample.scene(background, seed + k), JUDGED_SIZE))
        for k in range(count)
    ]


def evaluate_subject(
    generate: Generate,
    sample: SampleSubject,
    instrument: Instrument,
    backgrounds: Sequence[str] = NEW_BACKGROUNDS,
    count: int = 4,
    seed: int = 0,
) -> SubjectScore:
    """Ask a model for the subject in every place and judge the pictures.

    Args:
        generate: the model; gets prompts such as "a photo of a sks mug in the snow".
        sample: whose likeness it should have learned.
        instrument: the judges.
        backgrounds: where to; by default where no photo was taken.
        count: pictures per place.
        seed: of the first place; the next ones count on.

    Raises:
        ValueError: no background, or ``generate`` returned another number of pictures.
    """
    if not backgrounds:
        raise ValueError("no backgrounds to ask for")
    similarities, ceilings, images, wanted = [], [], [], []
    for number, background in enumerate(backgrounds):
        pictures = generate(sample.prompt(background), seed + number, count)
        if len(pictures) != count:
            raise ValueError(f"asked for {count} pictures, got {len(pictures)}")
        truth = true_pictures(sample, background, 4)
        others = true_pictures(sample, background, 4, TRUTH_SEED + 100)
        similarities.append(subject_similarity(instrument, pictures, truth))
        ceilings.append(subject_similarity(instrument, others, truth))
        images += pictures
        wanted += [_wish(sample, background)] * count
    accuracy = judge_prompt(instrument, images, wanted)
    return SubjectScore(
        similarity=sum(similarities) / len(similarities),
        ceiling=sum(ceilings) / len(ceilings),
        background_accuracy=accuracy["background"],
        class_accuracy=accuracy.get("kind"),
        pictures=len(images),
    )


def _wish(sample: SampleSubject, background: str) -> dict[str, str]:
    wish = {"background": background}
    if sample.subject.kind in ATTRIBUTES["kind"]:
        wish["kind"] = sample.subject.kind
    return wish
