"""A trial that trains and is measured, on the toy world and on photos."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.quantised import quantise
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.toy.judges import answer, measure
from lab.study.config import Study
from lab.study.report import Results, _intro
from lab.study.run import run_study
from lab.study.subjects import ToySource
from lab.study.trials import _live_bytes, kept_bytes
from lab.tests.study.helpers import study
from tests.refusal import refused
from tests.shallow import *  # noqa: F403

SHORT = {
    "subjects": ["star_teapot"],
    "seeds": 1,
    "tune": None,
    "common": {
        "learning_rate": 1e-3, "max_train_steps": 2, "rank": 2, "conv_rank": 2,
        "targets": ["attention"],
    },
    "asked": {"inference_steps": 1, "analysis_points": 2, "batch_size": 30},
}  # fmt: skip
METHODS = {
    "dora": {"max_train_steps": 1},
    "average": {"max_train_steps": 1, "ema_decay": 0.99},
    "full": {"method": "full", "full_weights": "targets"},
    "dvora": {"parametrization": "vera", "vera_rank": 4},
    "wild": {"learning_rate": 1e30},
}


class Performed(NamedTuple):
    """A study of one trial of each method."""

    study: Study
    output: Path
    results: Results

    def record(self, row: str) -> dict[str, Any]:
        (one,) = (record for record in self.results.records if record["row"] == row)
        return one


@pytest.fixture(scope="module")
def performed(tmp_path_factory):
    measured, measure_it = [], ToySource.measure

    def first_ones(*given):
        """Measure the base and the first two methods, whose figures are looked at."""
        measured.append(given)
        return measure_it(*given) if len(measured) <= 3 else ({}, Image.new("RGB", (1, 1)))

    given = study(**SHORT, methods=METHODS)
    output = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToySource, "measure", first_ones)
        results = run_study(given, output)
    return Performed(given, output, results)


def test_a_trial_is_trained_measured_and_analyzed(performed):
    results = performed.results
    assert [record["row"] for record in results.records] == ["base", *METHODS]
    base, dora, _, full, dvora, _ = results.records
    # The base by the functions of `evaluate`, asked anew.
    subject = results.subjects[0]
    components = load_components(performed.study.base)
    requests = subject._requests("sks teapot", 0)
    answers = answer(components, requests, SamplingSettings(1, 3.5))
    for name, values in measure(subject.subject, requests, answers).items():
        assert base["measures"][name] == pytest.approx(np.mean(values[0]), abs=1e-3)
    assert dora["measures"]["denoising_loss"] != base["measures"]["denoising_loss"]
    layers = [m for n, m in components.denoiser.named_modules()
              if "attn" in n and isinstance(m, torch.nn.Linear)]  # fmt: skip
    # Attention layers of the UNet have no bias but that of their output.
    assert full["parameters"] == sum(p.numel() for m in layers for p in m.parameters())
    assert dora["parameters"] == sum(
        2 * (m.in_features + m.out_features) + m.out_features for m in layers
    )
    # What trains, not what it is written as: d, b and m.
    assert dvora["parameters"] == sum(4 + 2 * m.out_features for m in layers)
    for record, steps in ((dora, [1]), (full, [1, 2]), (dvora, [1, 2])):
        points = record["analysis"]["points"]
        assert [point["step"] for point in points] == steps
        assert len(points[0]["delta_m"]) == len(layers)
        assert -1 <= record["analysis"]["correlation"] <= 1
    # Moments and gradients of what trains, beside the same model.
    extra = 12 * (full["parameters"] - dora["parameters"])
    assert full["live_bytes"] - dora["live_bytes"] == pytest.approx(extra, rel=0.5)
    assert results.images["dora", "star_teapot"].is_file()
    assert not list((performed.output / "work" / "trials").iterdir())


def test_an_average_is_what_is_measured_and_analyzed(performed):
    """After one step it has 9/11 of what the weights moved by, so that magnitudes show it."""
    live, average = performed.record("dora"), performed.record("average")
    moved, part = (r["analysis"]["points"][0]["delta_m"] for r in (live, average))
    assert part == pytest.approx([9 / 11 * delta for delta in moved], rel=1e-3)
    assert average["measures"]["others_loss"] != live["measures"]["others_loss"]


def test_a_training_that_diverges_is_a_record_without_figures(performed, monkeypatch):
    wild = performed.record("wild")
    assert "the loss is nan at step 2" in wild["diverged"]
    assert wild["measures"] == {}
    assert "1 diverged and have no figures (wild)" in _intro(performed.results)
    monkeypatch.setattr("lab.study.run.perform", None)  # not tried again
    again = run_study(performed.study, performed.output)
    assert again.records == performed.results.records


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
        step=SimpleNamespace(optimizer=optimizer),
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
