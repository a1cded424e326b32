"""metrics.jsonl: lines that wait for room, numbers that are not finite, and losses that rise."""

from __future__ import annotations

import errno
import json
import random
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.config import TrainConfig
from dora_diffusion.training import metrics
from dora_diffusion.training.events import StepDone
from dora_diffusion.training.metrics import (
    LossWatch,
    MetricsLog,
    Trackers,
    TrainingError,
    step_tags,
    tracked_settings,
)
from dora_diffusion.training.recipe import train
from dora_diffusion.training.step import Step
from tests.training.helpers import make_config, names, steps_in, warnings_of


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *, moves: bool = False) -> None:
    """From a step on, its gradients are NaN; or, ``moves``, what the optimizer makes of them is."""
    update = Step.update

    def poisoned(self: Step, number: int, losses: list[torch.Tensor]):
        if number >= step and moves:
            for group in self.optimizer.param_groups:
                group["lr"] = 1e39
        elif number >= step:
            self.parameters.take_gradients()
            monkeypatch.setattr(self.parameters, "take_gradients", lambda: None)
            for parameter in self.parameters:
                parameter.grad = torch.full_like(parameter, float("nan"))
        return update(self, number, losses)

    monkeypatch.setattr(Step, "update", poisoned)


def numbers_in(folder) -> list[torch.Tensor]:
    """All numbers of a folder's files of weights and state."""
    found = [t for path in folder.rglob("*.safetensors") for t in load_file(path).values()]
    for path in folder.rglob("training_state.pt"):
        state = torch.load(path, weights_only=True)
        found += state["parameters"].values()
        found += [t for moments in state["optimizer"]["state"].values() for t in moments.values()]
    return found


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_a_gradient_that_is_not_finite_costs_nothing_that_was_there(
    method, tiny_run, tmp_path, monkeypatch
):
    """At the last step of a run that extends a finished one: its checkpoint and its result stay."""
    out = tmp_path / "out"
    full = {"full_weights": "targets"} if method == "full" else {}
    config = tiny_run(
        method=method, max_train_steps=2, checkpointing_steps=2, checkpoints_total_limit=1, **full
    )
    result = train(config)
    written = result.adapter or result.model / "unet" / "diffusion_pytorch_model.safetensors"
    before = written.read_bytes()
    poison(monkeypatch, 4)
    with pytest.raises(TrainingError, match=r"the gradients .* at step 4; .*learning rate") as e:
        train(replace(config, max_train_steps=4, resume_from_checkpoint="latest"))
    assert "\n" not in str(e.value)
    assert written.read_bytes() == before
    assert names(out) == ["checkpoint-2"]
    found = numbers_in(out)
    assert len(found) > 10
    assert all(torch.isfinite(numbers).all() for numbers in found)
    assert steps_in(out) == [1, 2, 3]
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("method", ["dora", "full"])
def test_weights_that_are_not_finite_are_not_written(method, tiny_run, tmp_path, monkeypatch):
    """A finite gradient of the last step, from which a rate beyond all numbers makes infinities."""
    out = tmp_path / "out"
    full = {"full_weights": "targets"} if method == "full" else {}
    config = tiny_run(method=method, max_train_steps=2, checkpoints_total_limit=1, **full)
    poison(monkeypatch, 2, moves=True)
    with pytest.raises(TrainingError, match=r"after step 2 is not written: .*not finite"):
        train(replace(config, checkpointing_steps=1))
    assert names(out) == ["checkpoint-1"]
    assert all(torch.isfinite(numbers).all() for numbers in numbers_in(out))
    with pytest.raises(TrainingError, match=r"after step 2 is not written: .*not finite"):
        train(replace(config, checkpointing_steps=0, overwrite_output_dir=True))
    assert not numbers_in(out), "no result either"


# Two runs on the embedded model with one photo a step: at 1e-3, and fallen apart at 0.03.
USUAL = [
    0.0023, 0.027, 0.042, 0.0028, 0.017, 0.058, 0.0023, 0.0052, 0.034, 0.023, 0.057, 0.019, 0.0024,
    0.0012, 0.0033, 0.023, 0.014, 0.0032, 0.023, 0.0064, 0.017, 0.036, 0.012, 0.0014, 0.074, 0.08,
    0.011, 0.034, 0.035, 0.058, 0.016, 0.005, 0.014, 0.071, 0.017, 0.069, 0.042, 0.027, 0.003,
]  # fmt: skip
APART = [
    0.014, 0.0049, 0.018, 0.41, 0.12, 0.0073, 0.25, 0.054, 0.19, 0.59, 0.081, 0.0053, 0.97, 0.9,
    0.035, 0.69, 0.65, 0.88, 0.23, 0.023, 0.057, 0.92, 0.2, 0.77, 0.51, 0.23, 0.012, 0.73,
]  # fmt: skip


def test_a_loss_that_rises_is_told_within_steps_and_a_usual_one_never():
    rng = random.Random(0)
    for _ in range(20):
        usual, watch = rng.choices(USUAL, k=500), LossWatch()
        for step, loss in enumerate(usual, start=1):
            watch.add(step, loss)
        assert watch.risen_at is None
        stable = sum(map(watch.is_stable, range(1, 501)))
        assert stable > 350
        for step, loss in enumerate(rng.choices(APART, k=60), start=501):
            watch.add(step, loss)
        assert 503 <= watch.risen_at <= 540
        assert not any(map(watch.is_stable, range(watch.risen_at, 561)))


def test_a_run_that_falls_apart_keeps_its_checkpoint_from_before_and_names_it(
    tiny_run, tmp_path, monkeypatch
):
    """An interrupted run that is resumed at another rate, held against its own start."""
    monkeypatch.setattr(metrics, "_START", 2)
    real = Step.update

    def rises(self, step, losses):
        record = real(self, step, losses)
        return record | {"loss": record["loss"] * (1000 if step > 4 else 1)}

    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Step, "update", rises)
    config = tiny_run(max_train_steps=10, checkpointing_steps=2, checkpoints_total_limit=1)
    assert train(config, stop).steps == 4
    said = warnings_of(replace(config, resume_from_checkpoint="latest", learning_rate=0.1))
    assert "learning_rate is 0.1; for adapters adamw usually takes 1e-06 to 0.005" in said
    told = [text for text in said if "the loss" in text]
    assert len(told) == 2
    assert told[0].startswith("the loss has risen far above its start by step 8 (more than 3 times")
    assert f"{tmp_path / 'out' / 'checkpoint-4'} is from before" in told[1]
    assert names(tmp_path / "out") == ["checkpoint-10", "checkpoint-4"]


def test_fp16_may_skip_steps_but_not_for_ever():
    seen: list[int] = []
    log = MetricsLog(None, 0, lambda record: seen.append(record["step"]), skips=3)
    norms = [float("inf")] * 3 + [1.0] + [float("nan")] * 4
    with pytest.raises(TrainingError, match="not finite at step 8, as at the 3 steps before"):  # noqa: PT012
        for step, norm in enumerate(norms, start=1):
            log.add({"step": step, "loss": 0.5, "grad_norm": norm})
        log.flush()
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_metrics_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, lambda record: None)
    real, refused = log._file._file.write, []

    class Full:
        """A disk that takes half of a line and then nothing."""

        def write(self, data):
            if not refused:
                refused.append(data)
                return real(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(disk, name)

    disk, log._file._file = log._file._file, Full()
    log.add({"step": 1, "loss": 0.5})
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written: No space left"):
        log.add({"step": 2, "loss": 0.5})
    log.add({"step": 3, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "", "no half line"
    log._file._file = disk
    log.flush()
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(sd1_folder, photos, tmp_path):
    config = make_config(sd1_folder, photos, tmp_path / "out", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d"):
        train(config)


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path):
    """The rest of a line that a crash or an editor has left costs the run none of the others."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 4)]
    path.write_text(
        whole[0] + '{"step": 2, "lo}\n{"step": null}\n' + whole[1] + whole[2], encoding="utf-8"
    )
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 2 lines cannot be read"):
        log = MetricsLog(path, 3, lambda record: None)
    log.close()
    assert path.read_text(encoding="utf-8") == whole[0] + whole[1]
    assert log.steps_dropped == 1


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
