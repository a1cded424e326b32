"""What TensorBoard and other trackers get, and Prodigy's rate."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.loop import train
from dora_diffusion.training.results.trackers import Trackers, step_tags, tracked_settings


def records(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_tensorboard_gets_numbers_settings_and_samples(tiny_run, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = tiny_run(
        report_to="tensorboard",
        max_train_steps=3,
        with_prior_preservation=True,
        prior_preservation_mode="image-free",
        validation_prompt=["a sks mug", "a sks mug at night"],
        num_validation_images=2,
        validation_steps=2,
    )
    train(config)
    (events,) = (tmp_path / "out" / "logs").rglob("events.*")
    reader = event_accumulator.EventAccumulator(str(events.parent))
    reader.Reload()
    tags = reader.Tags()
    assert set(tags["scalars"]) == {
        "train/loss", "train/prior_loss", "train/grad_norm",
        "lr/unet/down", "lr/unet/up", "lr/unet/magnitude",
    }  # fmt: skip
    logged = records(tmp_path / "out")
    for name in ("loss", "prior_loss", "grad_norm"):
        scalars = {event.step: event.value for event in reader.Scalars(f"train/{name}")}
        assert scalars == pytest.approx({record["step"]: record[name] for record in logged})
    assert [event.step for event in reader.Images("samples/adapter")] == [2, 3]
    assert [event.step for event in reader.Images("samples/adapter/2")] == [2, 3]
    (base,) = reader.Images("samples/base")
    with Image.open(tmp_path / "out" / "samples" / "base.png") as sheet:
        assert (base.step, base.width, base.height) == (3, *sheet.size)
    start = plugin_data_pb2.HParamsPluginData.FromString(
        reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert start["learning_rate"].number_value == pytest.approx(8e-5)
    assert start["max_train_steps"].number_value == 3
    assert start["validation_prompt"].string_value == "a sks mug | a sks mug at night"
    assert start["instance_data_dir"].string_value == "photos"
    assert str(tmp_path) not in str(start)


class Tracker:
    """Another tracker, such as Weights & Biases, as Accelerate has it."""

    name = "wandb"

    def __init__(self) -> None:
        self.settings, self.images = None, []

    def store_init_configuration(self, values):
        self.settings = values

    def log_images(self, values, step):
        self.images.append((values, step))


class Accelerator:
    """Accelerate's part in trackers."""

    def __init__(self) -> None:
        self.trackers, self.logged = [Tracker()], []

    def init_trackers(self, project):
        self.project = project

    def log(self, values, step):
        self.logged.append((values, step))


def test_other_trackers_get_the_same():
    accelerator = Accelerator()
    trackers = Trackers(accelerator, enabled=True)
    trackers.begin({"rank": 8})
    trackers.log_step({"step": 7, "loss": 0.5, "grad_norm": 1.0, "lr": {"unet/up": 1e-4}})
    trackers.log_images("samples/base", [Image.new("RGB", (6, 4), "red")] * 2, 7)
    (tracker,) = accelerator.trackers
    assert tracker.settings == {"rank": 8}
    assert accelerator.logged == [
        ({"train/loss": 0.5, "train/grad_norm": 1.0, "lr/unet/up": 1e-4}, 7)
    ]
    ((images, step),) = tracker.images
    assert step == 7
    assert images["samples/base"].shape == (2, 4, 6, 3)
    assert np.array_equal(images["samples/base"][0, 0, 0], (255, 0, 0))


def test_a_tracker_that_cannot_write_is_a_warning_once():
    accelerator = Accelerator()

    def full(values, step):
        raise OSError(28, "No space left on device")

    accelerator.log = full
    trackers = Trackers(accelerator, enabled=True)
    with pytest.warns(UserWarning, match="the tracker cannot write"):
        trackers.log_step({"step": 1, "loss": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log_step({"step": 2, "loss": 0.5})


def test_settings_that_name_folders_lose_the_way_to_them():
    config = TrainConfig(
        instance_data_dir="/home/me/private/dog", output_dir="/home/me/out", class_word=None
    )
    settings = tracked_settings(replace(config, resolution=512))
    assert settings["instance_data_dir"] == "dog"
    assert settings["output_dir"] == "out"
    assert (settings["class_word"], settings["resolution"]) == ("", 512)
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())


def test_an_fp16_step_without_a_norm_has_no_tag_for_it():
    assert step_tags({"loss": 1.0, "grad_norm": None, "lr": {}}) == {"train/loss": 1.0}
    assert step_tags({"step": 2, "validation_loss": 0.5}) == {"validation/loss": 0.5}


def test_prodigys_rate_is_what_its_step_takes(tiny_run, tmp_path, monkeypatch):
    """Against the library: with betas of 0 a first step moves B by the rate, along the sign."""
    pytest.importorskip("prodigyopt")
    from prodigyopt import Prodigy

    taken = []
    real = Prodigy.step

    def step(self, closure=None):
        group = next(group for group in self.param_groups if group["name"] == "unet/up")
        before = [p.detach().clone() for p in group["params"]]
        result = real(self, closure)
        moves = [(p - q).abs().max() for p, q in zip(group["params"], before, strict=True)]
        taken.append(float(max(moves)))
        return result

    monkeypatch.setattr(Prodigy, "step", step)
    config = tiny_run(
        optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.0, max_train_steps=1,
        adam_beta1=0.0, adam_beta2=0.0, adam_epsilon=1e-12, max_grad_norm=0.0,
    )  # fmt: skip
    train(config)
    (record,) = records(tmp_path / "out")
    assert record["lr"]["unet/up"] == 1.0
    assert record["effective_lr"]["unet/up"] == 1e-6  # its first d, by its documentation
    assert taken == [pytest.approx(1e-6, rel=1e-3)]
    assert step_tags(record)["effective_lr/unet/up"] == 1e-6


def test_prodigys_rate_grows_and_adamws_is_not_written(tiny_run, tmp_path):
    pytest.importorskip("prodigyopt")
    train(tiny_run(optimizer="prodigy", learning_rate=1.0, max_train_steps=20))
    rates = [record["effective_lr"]["unet/down"] for record in records(tmp_path / "out")]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]
    train(tiny_run(output_dir=str(tmp_path / "adamw"), max_train_steps=1))
    assert "effective_lr" not in records(tmp_path / "adamw")[0]
