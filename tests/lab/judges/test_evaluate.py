"""Measuring in the toy world: a perfect model reaches the ceiling, and nothing drifts by itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.evaluation.measures import MEASURES, summarize
from dora_diffusion.lab.judges.evaluate import Answers, evaluate_toy, measure, true_answers
from dora_diffusion.lab.judges.requests import (
    reference_images,
    toy_requests,
    true_images,
)
from dora_diffusion.lab.toy.benchmark_subjects import REPORTED, find_subject
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import SamplingSettings

SEEDS = (0, 1)


def means(subject, requests, answers, base=None):
    values = measure(subject, requests, answers, base=base)
    return {name: summarize(name, found).mean for name, found in values.items()}


@pytest.mark.parametrize("subject", REPORTED, ids=lambda s: s.name)
def test_a_perfect_model_reaches_the_ceiling(subject) -> None:
    requests = toy_requests(subject, f"sks {subject.word}", SEEDS)
    truth = true_answers(requests)
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
    found = means(subject, requests, Answers(strangers[: len(requests)], [None] * len(requests)))
    assert found["subject_similarity"] <= 0.3
    assert found["subject_kind"] == found["class_kind"] == 0
    assert "others_change" not in found


def test_a_subject_that_swallows_everything_is_found_out() -> None:
    subject = find_subject("cross_mug")
    requests = toy_requests(subject, "sks mug", SEEDS)
    itself = (reference_images(subject, 64) * len(requests))[: len(requests)]
    base = true_answers(requests)
    found = means(subject, requests, Answers(itself, [None] * len(requests)), base)
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
    found = means(subject, requests, Answers(images, [None] * len(requests)))
    varied = means(subject, requests, true_answers(requests))
    for name in ("diversity_features", "diversity_pixels"):
        assert found[name] == pytest.approx(0, abs=1e-3)
        assert varied[name] > 0.01
    alone = toy_requests(subject, "sks ball", [0], ["subject"])
    assert "diversity_pixels" not in means(subject, alone, true_answers(alone))


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
        measure(subject, requests, Answers([Image.new("RGB", (64, 64))], [None]))
    with pytest.raises(ValueError, match="no seeds"):
        evaluate_toy(load_components("embedded:tiny-sd"), subject, "sks mug", [])
