"""Requests and measures in the toy world: a perfect model reaches the ceiling, nothing drifts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.evaluation.measures import MEASURES, similarities, summarize
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.benchmark_subjects import REPORTED, SUBJECTS, find_subject
from dora_diffusion.toy.instrument import Instrument, load_instrument
from dora_diffusion.toy.judges import (
    GROUPS,
    Answers,
    ask_toy,
    compose,
    evaluate_toy,
    judge,
    judged_pixels,
    measure,
    reference_images,
    sample_subject,
    toy_requests,
    true_images,
)
from dora_diffusion.toy.shapes import CLASSES
from dora_diffusion.toy.world import BACKGROUNDS, Scene, render

SEEDS = (0, 1)


def means(subject, requests, answers, base=None):
    values = measure(subject, requests, answers, base=base)
    return {name: summarize(name, found).mean for name, found in values.items()}


@pytest.mark.parametrize("subject", REPORTED, ids=lambda s: s.name)
def test_a_perfect_model_reaches_the_ceiling(subject) -> None:
    requests = toy_requests(subject, f"sks {subject.word}", SEEDS[:1])
    truth = Answers(true_images(requests, 64))
    found = means(subject, requests, truth, base=truth)
    assert found["subject_similarity"] >= 0.9
    for name in ("background", "side", "size", "others_kind", "others_color", "others_background"):
        assert found[name] >= 0.95, name
    assert all(found[name] >= 0.9 for name in found if name.startswith("subject_"))
    assert ("subject_kind" in found) == ("class_kind" in found) == subject.known_class
    assert found["class_similarity"] <= 0.5
    assert found["class_leakage"] <= 0.2
    assert found["others_leakage"] <= 0.15
    assert found["others_change"] == pytest.approx(0, abs=1e-6)
    assert found.keys() <= MEASURES.keys()


def test_another_subject_scores_nothing_and_leaks_nothing() -> None:
    subject, other = find_subject("cross_mug"), find_subject("star_teapot")
    requests = toy_requests(subject, "sks mug", SEEDS)
    strangers = reference_images(other, 64) * len(requests)
    found = means(subject, requests, Answers(strangers[: len(requests)]))
    assert found["subject_similarity"] <= 0.3
    assert found["subject_kind"] == found["class_kind"] == 0
    assert "others_change" not in found


def test_a_subject_that_swallows_everything_is_found_out() -> None:
    subject = find_subject("cross_mug")
    requests = toy_requests(subject, "sks mug", SEEDS)
    itself = (reference_images(subject, 64) * len(requests))[: len(requests)]
    base = Answers(true_images(requests, 64))
    found = means(subject, requests, Answers(itself), base)
    assert found["subject_similarity"] >= 0.9
    assert found["class_leakage"] == found["others_leakage"] == 1
    assert found["class_similarity"] >= 0.9
    assert found["others_kind"] <= 0.1
    assert found["others_change"] > 0.1


def test_one_image_again_and_again_has_no_diversity() -> None:
    subject = find_subject("heart_ball")
    requests = toy_requests(subject, "sks ball", SEEDS, ["subject"])
    rounds = len(requests) // len(SEEDS)
    images = true_images(requests[:rounds], 64) * len(SEEDS)
    found = means(subject, requests, Answers(images))
    varied = means(subject, requests, Answers(true_images(requests, 64)))
    for name in ("diversity_features", "diversity_pixels"):
        assert found[name] == pytest.approx(0, abs=1e-3)
        assert varied[name] > 0.01
    alone = toy_requests(subject, "sks ball", [0], ["subject"])
    assert "diversity_pixels" not in means(subject, alone, Answers(true_images(alone, 64)))


def test_the_base_does_not_drift_from_itself() -> None:
    """The embedded model with no adapter on it, in both columns."""
    components = load_components("embedded:tiny-sd")
    subject = find_subject("cross_mug")
    evaluation = evaluate_toy(
        components, subject, "sks mug", [5], SamplingSettings(steps=2, guidance_scale=1.0)
    )
    for name in evaluation.names:
        change = evaluation.interval("change", name)
        assert change is not None
        assert change.mean == pytest.approx(0, abs=1e-6), name
    loss = evaluation.interval("base", "denoising_loss")
    assert loss is not None
    assert 0 < loss.mean < 1
    images = evaluation.images
    assert len(images["base"]) == len(images["truth"]) == len(evaluation.labels)
    assert np.array_equal(np.asarray(images["base"][0]), np.asarray(images["adapted"][0]))


def test_bad_calls_say_so() -> None:
    subject = find_subject("cross_mug")
    requests = toy_requests(subject, "sks mug", [0], ["subject"])
    with pytest.raises(ValueError, match="5 requests but 1 images"):
        measure(subject, requests, Answers([Image.new("RGB", (64, 64))]))
    with pytest.raises(ValueError, match="no seeds"):
        evaluate_toy(None, subject, "sks mug", [])


def drawn_scene(index: int) -> Scene:
    generator = np.random.default_rng((12, index))
    background = str(generator.choice(list(BACKGROUNDS)))
    return compose(sample_subject(generator), background, generator)


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument()


def test_images_of_any_size_are_judged_at_64() -> None:
    scene = drawn_scene(3)
    large = Image.fromarray(render(scene, (320, 256)))
    small = np.asarray(judged_pixels([Image.fromarray(render(scene, 64))]))
    assert np.abs(np.asarray(judged_pixels([large])) - small).mean() < 0.03
    with pytest.raises(ValueError, match="no images"):
        judged_pixels([])


def test_the_judge_reads_real_renders(instrument: Instrument) -> None:
    scenes = [drawn_scene(i) for i in range(40)]
    seen = judge(instrument, [Image.fromarray(render(scene, 64)) for scene in scenes])
    for name, truth in {
        "kind": [s.subject.kind for s in scenes],
        "color": [s.subject.color for s in scenes],
        "pattern": [s.subject.pattern for s in scenes],
        "background": [s.background for s in scenes],
    }.items():
        assert np.mean([a == t for a, t in zip(seen.answers[name], truth, strict=True)]) >= 0.95
    assert seen.pixels.min() >= 0
    assert seen.pixels.max() <= 1


def test_every_subject_resembles_itself_alone(instrument: Instrument) -> None:
    images = [reference_images(subject, 64, views=2) for subject in REPORTED]
    vectors = [judge(instrument, found).identity for found in images]
    table = np.array([[np.mean(similarities(a, b)) for b in vectors] for a in vectors])
    assert table.diagonal().min() >= 0.9
    assert table[~np.eye(len(REPORTED), dtype=bool)].max() <= 0.5


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda s: s.name)
def test_requests_ask_for_what_their_scenes_show(subject) -> None:
    requests = toy_requests(subject, "zwx thing", (3, 4))
    assert len({request.seed for request in requests}) == len(requests)
    per_round = len(requests) // 2
    assert [r.prompt for r in requests[:5]] == [r.prompt for r in requests[per_round:][:5]]
    for request in requests:
        has_token = "zwx" in request.prompt
        assert has_token == (request.group in ("subject", "pose"))
        assert (request.scene.subject == subject.sample.subject) == has_token
        assert request.wanted.get("background", request.scene.background) == (
            request.scene.background
        )
    new = {request.scene.background for request in requests if request.group == "subject"}
    assert new == set(subject.held_out_backgrounds)
    others = {r.scene.subject.kind for r in requests if r.group == "others"}
    assert others == set(CLASSES) - {subject.sample.subject.kind}
    assert {request.group for request in requests} == set(GROUPS)


def test_it_is_said_what_similarity_is_to() -> None:
    questions = ask_toy("bolt_mug", "sks mug", SamplingSettings())
    assert questions.similar_to == "the true subject"
    assert "held-out backgrounds" in questions.notes[0]


def test_prompts_read_like_captions() -> None:
    prompts = {r.prompt for r in toy_requests(find_subject("cross_mug"), "sks mug", [0])}
    assert {
        "a photo of a sks mug in the sea",
        "a photo of a sks mug on the left in a studio",
        "a photo of a small sks mug in a studio",
        "a photo of a mug in the sea",
    } <= prompts
