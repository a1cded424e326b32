"""Real photos: figures by metric models against plain cosines, on the tiny pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.data.images import PhotoError
from dora_diffusion.data.photos import list_photos
from dora_diffusion.evaluation.measures import summarize
from dora_diffusion.evaluation.photos import (
    OTHERS,
    PROMPTS,
    evaluate_photos,
    measure_photos,
    measure_references,
    photo_requests,
    read_subject,
)
from dora_diffusion.models.load import load_components
from dora_diffusion.models.metric_models import open_metric_model
from dora_diffusion.sampling.settings import SamplingSettings

SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, width=32, height=32)


def test_prompts_name_subject_class_and_other_things() -> None:
    requests = photo_requests("sks dog", "dog", [1, 2])
    assert len(requests) == 2 * (2 * len(PROMPTS) + len(OTHERS) - 1)
    assert len({request.seed for request in requests}) == len(requests)
    first = requests[0]
    assert (first.prompt, first.meaning) == (
        "a photo of a sks dog on the beach",
        "a photo of a dog on the beach",
    )
    assert not any(r.group == "others" and "dog" in r.prompt for r in requests)
    nameless = photo_requests("sks", "", [0], ["{} here"])
    assert {r.group for r in nameless} == {"subject", "others"}
    assert nameless[0].meaning == "it here"
    with pytest.raises(ValueError, match=r"has no \{\}"):
        photo_requests("sks dog", "dog", [0], ["a dog"])


def test_figures_are_the_plain_cosines(clip_folder, dino_folder, held_out_photos) -> None:
    references = [Image.open(path) for path in list_photos(held_out_photos)]
    models = [open_metric_model(clip_folder), open_metric_model(dino_folder)]
    requests = photo_requests("sks mug", "mug", [0, 1], ["a photo of {} on grass"])
    count = len(requests)
    images = [Image.new("RGB", (40, 40), (5 * k, 255 - 7 * k, 90)) for k in range(count)]
    base = images[::-1]
    losses = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]
    found = measure_photos(requests, images, losses, references, models, base)

    def flat(name: str) -> list[float]:
        return [value for group in found[name] for value in group]

    def rows(group: str) -> list[int]:
        return [row for row, request in enumerate(requests) if request.group == group]

    for model in models:
        seen, truth = model.image_features(images), model.image_features(references)
        before = model.image_features(base)
        wanted = [float((seen[r] @ truth.T).mean()) for r in rows("subject")]
        assert flat(f"subject_similarity@{model.name}") == pytest.approx(wanted, abs=1e-6)
        change = [1 - float(seen[r] @ before[r]) for r in rows("others")]
        assert flat(f"others_change@{model.name}") == pytest.approx(change, abs=1e-6)
        first, second = rows("subject")
        apart = 1 - float(seen[first] @ seen[second])
        diversity = flat(f"diversity_features@{model.name}")
        assert diversity == pytest.approx([apart, apart], abs=1e-6)
    clip = models[0]
    text = clip.text_features(["a photo of a mug on grass"])[0]
    wanted = [float(clip.image_features([images[r]])[0] @ text) for r in rows("subject")]
    assert flat("prompt_similarity@tiny-clip") == pytest.approx(wanted, abs=1e-6)
    assert "prompt_similarity@tiny-dino" not in found
    assert summarize("denoising_loss", found["denoising_loss"]).mean == pytest.approx(0.2)


def test_photos_are_measured_against_each_other(dino_folder, held_out_photos) -> None:
    references = [Image.open(path) for path in list_photos(held_out_photos)]
    model = open_metric_model(dino_folder)
    [(name, values)] = measure_references(references, [model]).items()
    vectors = model.image_features(references)
    pairs = torch.triu_indices(3, 3, 1)
    wanted = float((vectors @ vectors.T)[pairs[0], pairs[1]].mean())
    assert summarize(name, values).mean == pytest.approx(wanted, abs=1e-6)
    assert measure_references(references[:1], [model]) == {}


def test_without_metric_models_it_says_what_is_missing(sd1_folder, held_out_photos) -> None:
    components = load_components(sd1_folder)
    subject = read_subject(held_out_photos, "sks mug", "mug")
    evaluation = evaluate_photos(components, subject, [0, 1], SETTINGS, prompts=["{} at sea"])
    assert set(evaluation.columns) == {"base", "adapted"}
    assert set(evaluation.names) == {"diversity_pixels", "denoising_loss"}
    assert "pip install efficientnet" in evaluation.notes[0]
    assert "CLIP" in evaluation.notes[1]
    for name in evaluation.names:
        change = evaluation.interval("change", name)
        assert change is not None
        assert change.mean == 0


def test_bad_calls_say_so(sd1_folder, tmp_path, held_out_photos) -> None:
    with pytest.raises(PhotoError, match="no photo"):
        read_subject(tmp_path, "sks mug", "mug")
    subject = read_subject(held_out_photos, "sks mug", "mug")
    with pytest.raises(ValueError, match="no seeds"):
        evaluate_photos(load_components(sd1_folder), subject, [], SETTINGS)


def test_photos_that_were_trained_on_are_counted_by_their_content(held_out_photos) -> None:
    subject = read_subject(held_out_photos, "sks mug", "mug")
    digests = {photo.digest for photo in subject.photos}
    assert len(digests) == 3
    for known, which in (
        (0, ""),
        (1, "1 of these 3 photos was"),
        (2, "2 of these 3 photos were"),
        (3, "all of these photos were"),
    ):
        trained_on = {*sorted(digests)[:known], "another"}
        cautions = replace(subject, trained_on=trained_on).cautions
        assert [text.partition(" trained on")[0] for text in cautions] == ([which] if which else [])


def test_intervals_of_losses_are_over_photos():
    """Each seed is asked about the same five photos, which differ more than the seeds do."""
    generator = np.random.default_rng(1)
    requests = photo_requests("sks mug", "mug", [0], ["a photo of {} on grass"])
    images = [Image.new("RGB", (8, 8))] * len(requests)
    held = 0
    for _ in range(500):
        photos = generator.standard_normal(5)
        losses = [list(photos + 0.3 * generator.standard_normal(5)) for _ in range(4)]
        found = measure_photos(requests, images, losses, images, [], images)
        interval = summarize("denoising_loss", found["denoising_loss"])
        assert (interval.n, interval.mean) == (5, pytest.approx(np.mean(losses)))
        held += interval.low <= 0 <= interval.high
    assert 0.92 < held / 500 < 0.98
