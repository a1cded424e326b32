"""Judging: real renders score well, wrong wishes and strangers do not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.embedded.instrument import Instrument, load_instrument
from dora_diffusion.embedded.pretrain.data import held_out_scene
from dora_diffusion.embedded.samples import BOLT_MUG, HEART_TEAPOT, NEW_BACKGROUNDS, RING_ROBOT
from dora_diffusion.embedded.world import render
from dora_diffusion.evaluation.judge import judge_prompt, judged_pixels, subject_similarity
from dora_diffusion.evaluation.toy_subjects import evaluate_subject, true_pictures


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument()


def test_pictures_of_any_size_are_judged_at_64() -> None:
    scene = held_out_scene(3)
    large = Image.fromarray(render(scene, (320, 256)))
    small = np.asarray(judged_pixels([Image.fromarray(render(scene, 64))]))
    assert np.abs(np.asarray(judged_pixels([large])) - small).mean() < 0.03
    with pytest.raises(ValueError, match="no pictures"):
        judged_pixels([])


def test_true_wishes_are_granted_and_false_ones_are_not(instrument: Instrument) -> None:
    scenes = [held_out_scene(i) for i in range(40)]
    images = [Image.fromarray(render(scene, 64)) for scene in scenes]
    wishes = [{"kind": s.subject.kind, "background": s.background} for s in scenes]
    accuracy = judge_prompt(instrument, images, wishes)
    assert accuracy.keys() == {"kind", "background", "all"}
    assert accuracy["all"] >= 0.95
    elsewhere = [{"background": "sea" if s.background != "sea" else "snow"} for s in scenes]
    assert judge_prompt(instrument, images, elsewhere)["background"] <= 0.05


def test_wishes_must_fit_the_pictures_and_the_judge(instrument: Instrument) -> None:
    image = Image.fromarray(render(held_out_scene(0), 64))
    with pytest.raises(ValueError, match="1 pictures but 2"):
        judge_prompt(instrument, [image], [{}, {}])
    with pytest.raises(ValueError, match="no kind 'robot'"):
        judge_prompt(instrument, [image], [{"kind": "robot"}])


def test_a_subject_resembles_itself(instrument: Instrument) -> None:
    samples = (BOLT_MUG, HEART_TEAPOT, RING_ROBOT)
    photos = [true_pictures(s, "snow", 3, seed=1) for s in samples]
    truth = [true_pictures(s, "night", 3) for s in samples]
    table = np.array([[subject_similarity(instrument, p, t) for t in truth] for p in photos])
    assert table.diagonal().min() >= 0.75
    assert table[~np.eye(3, dtype=bool)].max() <= 0.4


def test_a_perfect_model_reaches_the_ceiling_and_a_stranger_does_not(
    instrument: Instrument,
) -> None:
    def perfect(prompt: str, seed: int, count: int) -> list[Image.Image]:
        background = next(b for b in NEW_BACKGROUNDS if BOLT_MUG.prompt(b) == prompt)
        return true_pictures(BOLT_MUG, background, count, seed + 7)

    def stranger(prompt: str, seed: int, count: int) -> list[Image.Image]:
        return true_pictures(HEART_TEAPOT, "grass", count)

    score = evaluate_subject(perfect, BOLT_MUG, instrument, count=2)
    assert score.pictures == 2 * len(NEW_BACKGROUNDS)
    assert score.similarity == pytest.approx(score.ceiling, abs=0.05)
    assert score.background_accuracy == score.class_accuracy == 1.0
    other = evaluate_subject(stranger, BOLT_MUG, instrument, count=2)
    assert other.similarity < 0.4
    assert other.background_accuracy == other.class_accuracy == 0.0


def test_an_unknown_class_is_not_judged(instrument: Instrument) -> None:
    score = evaluate_subject(
        lambda prompt, seed, count: true_pictures(RING_ROBOT, "sea", count),
        RING_ROBOT,
        instrument,
        ["sea"],
    )
    assert score.class_accuracy is None
    with pytest.raises(ValueError, match="no backgrounds"):
        evaluate_subject(lambda *_: [], RING_ROBOT, instrument, [])
    with pytest.raises(ValueError, match="asked for 4 pictures, got 0"):
        evaluate_subject(lambda *_: [], RING_ROBOT, instrument, ["sea"])
