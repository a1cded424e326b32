"""A trial that trains and is measured, on the toy world and on photos."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dora_diffusion.lab.judges import answer, measure
from dora_diffusion.lab.study.report import _intro
from dora_diffusion.lab.study.run import run_study
from dora_diffusion.lab.study.trials import _live_bytes, kept_bytes
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.quantised import quantise
from dora_diffusion.sampling.generate import SamplingSettings
from dora_diffusion.training.session import Session
from tests.lab.study.helpers import study
from tests.refusal import refused

SHORT = {
    "subjects": ["star_teapot"],
    "seeds": 1,
    "tune": None,
    "common": {"learning_rate": 1e-3, "max_train_steps": 2, "rank": 2, "conv_rank": 2},
    "asked": {"inference_steps": 1, "analysis_points": 2, "batch_size": 30},
}


def test_a_trial_is_trained_measured_and_analyzed(tmp_path):
    methods = {
        "dora": {"targets": ["attention"]},
        "full": {"method": "full", "full_weights": "targets", "targets": ["attention"]},
        "dvora": {"targets": ["attention"], "parametrization": "vera", "vera_rank": 4},
    }
    results = run_study(study(**SHORT, methods=methods), tmp_path)
    base, dora, full, dvora = results.records
    assert (base["row"], dora["row"], full["row"]) == ("base", "dora", "full")
    # The base by the functions of `evaluate`, asked anew.
    subject = results.subjects[0]
    components = load_components("embedded:tiny-sd")
    requests = subject._requests("sks teapot", 0)
    answers = answer(components, requests, SamplingSettings(1, 3.5))
    for name, values in measure(subject.subject, requests, answers).items():
        assert base["measures"][name] == pytest.approx(np.mean(values[0]), abs=1e-3)
    assert dora["measures"]["denoising_loss"] != base["measures"]["denoising_loss"]
    # Attention layers of the UNet have no bias but that of their output.
    layers = [m for n, m in components.unet.named_modules()
              if "attn" in n and isinstance(m, torch.nn.Linear)]  # fmt: skip
    assert full["parameters"] == sum(p.numel() for m in layers for p in m.parameters())
    assert dora["parameters"] == sum(
        2 * (m.in_features + m.out_features) + m.out_features for m in layers
    )
    # What trains, not what it is written as: d, b and m.
    assert dvora["parameters"] == sum(4 + 2 * m.out_features for m in layers)
    for record in (dora, full, dvora):
        points = record["analysis"]["points"]
        assert [point["step"] for point in points] == [1, 2]
        assert len(points[0]["delta_m"]) == len(layers)
        assert -1 <= record["analysis"]["correlation"] <= 1
    # Moments and gradients of what trains, beside the same model.
    extra = 12 * (full["parameters"] - dora["parameters"])
    assert full["live_bytes"] - dora["live_bytes"] == pytest.approx(extra, rel=0.5)
    assert results.images["dora", "star_teapot"].is_file()
    assert not list((tmp_path / "work" / "trials").iterdir())


def test_an_average_is_what_is_measured_and_analyzed(tmp_path):
    """After one step it has 9/11 of what the weights moved by, so that magnitudes show it."""
    methods = {"live": {"ema_decay": 0}, "average": {"ema_decay": 0.99}}
    common = {**SHORT["common"], "max_train_steps": 1, "targets": ["attention"]}
    asked = {"inference_steps": 1, "analysis_points": 1, "batch_size": 30}
    given = study(**{**SHORT, "common": common, "asked": asked}, methods=methods)
    _, live, average = run_study(given, tmp_path).records
    moved, part = (r["analysis"]["points"][0]["delta_m"] for r in (live, average))
    assert part == pytest.approx([9 / 11 * delta for delta in moved], rel=1e-3)
    assert average["measures"]["others_loss"] != live["measures"]["others_loss"]


def test_a_start_from_the_gradient_is_made_before_the_first_step(tmp_path, monkeypatch):
    began, start = [], Session.start_from_gradient

    def watched(session, adapters):
        began.append((session.learner.batches, start(session, adapters)))

    monkeypatch.setattr(Session, "start_from_gradient", watched)
    methods = {"random": {}, "gradient": {"init": "lora-one"}}
    common = {**SHORT["common"], "max_train_steps": 1, "targets": ["attention"]}
    asked = {"inference_steps": 1, "analysis_points": 0, "batch_size": 30}
    run_study(study(**{**SHORT, "common": common, "asked": asked}, methods=methods), tmp_path)
    (_, none), (batches, drift) = began
    assert none is None
    assert batches == 0
    assert drift > 0


def test_a_training_that_diverges_is_a_record_without_figures(tmp_path):
    methods = {"wild": {"learning_rate": 1e30, "targets": ["attention"]}}
    given = study(**{**SHORT, "asked": {"inference_steps": 1}}, methods=methods)
    _, wild = run_study(given, tmp_path).records
    assert "the loss is nan at step 2" in wild["diverged"]
    assert wild["measures"] == {}
    assert "1 diverged and have no figures (wild)" in _intro(run_study(given, tmp_path))


def test_photos_are_measured_on_those_held_out(tmp_path, samples_root, sd1_folder):
    trained, held_out = tmp_path / "photos", tmp_path / "held_out"
    for folder in (trained, held_out):
        folder.mkdir()
    photos = sorted(Path(samples_root / "bolt_mug").glob("*.jpg"))
    for number, photo in enumerate(photos):
        shutil.copy(photo, trained if number < 3 else held_out)
    subject = {
        "name": "my mug", "photos": str(trained), "held_out": str(held_out),
        "instance_prompt": "a photo of a sks mug",
    }  # fmt: skip
    given = study(**{**SHORT, "subjects": [subject]}, base=str(sd1_folder), methods={"dora": {}})
    results = run_study(given, tmp_path / "out")
    assert [record["subject"] for record in results.records] == ["my mug", "my mug"]
    assert set(results.records[0]["measures"]) == {"denoising_loss"}  # no metric model is given
    assert results.subjects[0].class_word == "mug"
    shutil.copy(photos[0], held_out)
    with refused("subjects", "1 photos of"):
        run_study(given, tmp_path / "out")


def test_live_bytes_are_weights_gradients_moments_and_what_is_kept():
    """Each storage once; steps of the optimizer are numbers, or tensors, which count."""
    layer, tied = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False)
    tied.weight = layer.weight
    layer.register_buffer("halves", torch.zeros(5, dtype=torch.float16))
    optimizer = torch.optim.AdamW([layer.weight])
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    session = SimpleNamespace(
        components=SimpleNamespace(modules=lambda: {"unet": layer, "vae": tied}),
        weights=SimpleNamespace(parameters=lambda: {"weight": layer.weight}),
        learner=SimpleNamespace(optimizer=optimizer),
    )
    weights, gradients, moments, step = 4 * (6 + 2) + 2 * 5, 4 * 6, 2 * 4 * 6, 4
    assert _live_bytes(session, 1000) == weights + gradients + moments + step + 1000
    layer.register_parameter(
        "quantised", torch.nn.Parameter(quantise(torch.ones(2, 64), "nf4"), False)
    )
    weights += 2 * 32 + 2 * 1 + 2 * 4  # codes, a scale of each block, and what these are scaled by
    assert _live_bytes(session, 1000) == weights + gradients + moments + step + 1000


def test_bytes_are_those_of_the_first_batch():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    x = torch.ones(2, 4)
    with kept_bytes() as kept:
        for _ in range(2):
            (x @ weight).exp().sum().backward()
    assert sum(kept.values()) == 4 * (8 + 8)  # x, and the result of exp; not the parameter
