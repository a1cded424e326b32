"""Several subjects trained at once: each adapter is that of its own run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.features.outside import with_features
from dora_diffusion.config.subject_list import subject_configs
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models import precision
from dora_diffusion.training import recipe
from dora_diffusion.training.events import StepDone, SubjectLeft
from dora_diffusion.training.pack import check_pack, train_pack
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.checkpoint import read_state
from tests.refusal import refused
from tests.training.helpers import SAMPLES, make_config, needs_library, small_samples

EXAMPLES = Path(__file__).parents[2] / "examples" / "features"

# What every subject has of its own: ranks, rates, limits, seeds, lengths.
THREE: list[dict[str, Any]] = [
    {
        "name": "mug", "instance_data_dir": str(SAMPLES / "bolt_mug"), "seed": 1, "ema_decay": 0.5,
    },
    {
        "name": "teapot", "instance_data_dir": str(SAMPLES / "heart_teapot"), "rank": 3,
        "instance_prompt": "a photo of a sks teapot", "max_train_steps": 2, "snr_gamma": 5,
        "loss_type": "huber", "huber_schedule": "exponential",
    },
    {
        "name": "other", "instance_data_dir": str(SAMPLES / "bolt_mug"), "rank": 4, "conv_rank": 1,
        "lora_alpha": 8, "learning_rate": 3e-4, "max_grad_norm": 0.01, "prior_loss_weight": 0.5,
        "lr_scheduler": "cosine", "train_batch_size": 2, "gradient_accumulation_steps": 2,
        "timestep_distribution": "power",
    },
]  # fmt: skip


def pack_of(
    base: Path, output: Path, entries: list[dict[str, Any]] = THREE, **settings: Any
) -> dict[str, TrainConfig]:
    def small(values: dict[str, Any]) -> dict[str, Any]:
        names = {str(SAMPLES / name): str(small_samples() / name) for name in os.listdir(SAMPLES)}
        places = {
            name: names[values[name]] for name in ("instance_data_dir", "class_data_dir")
            if values.get(name) in names
        }  # fmt: skip
        return {**values, **places}

    shared = make_config(base, "", output, **{"instance_data_dir": None, **small(settings)})
    return subject_configs([small(entry) for entry in entries], shared)


def alone(configs: Mapping[str, TrainConfig], name: str, **changes: Any) -> Path:
    """Train one subject by itself; returns its folder."""
    folder = Path(configs[name].output_dir).parent.with_name("alone") / name
    train(dataclasses.replace(configs[name], output_dir=str(folder), **changes))
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def assert_alike(packed: Path, own: Path, tolerance: float) -> None:
    """Adapter, metrics and files of a packed subject are those of its own run."""
    first, second = read_adapter(packed), read_adapter(own)
    assert first.metadata == second.metadata
    assert first.layers.keys() == second.layers.keys()
    for name, layer in first.layers.items():
        for part in ("down", "up", "magnitude"):
            values = getattr(layer, part), getattr(second.layers[name], part)
            if values[0] is not None:
                torch.testing.assert_close(*values, rtol=0, atol=tolerance)
    for one, other in zip(records(packed), records(own), strict=True):
        assert one["step"] == other["step"]
        assert one["lr"] == other["lr"]
        for figure in one.keys() & {"loss", "grad_norm", "prior_loss"}:
            assert one[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-6)
    assert {p.name for p in packed.iterdir()} == {p.name for p in own.iterdir()}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs load, adapt and train in double precision."""
    real = recipe.inject_trained

    def inject(*args: Any) -> Any:
        trained = real(*args)
        for model in trained.modules.values():
            for _, layer in adapted_layers(model):
                layer.adapters.double()
        return trained

    monkeypatch.setitem(precision.PRECISION_DTYPES, "no", torch.float64)
    monkeypatch.setattr(recipe, "inject_trained", inject)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# Linear layers, convolutions with and without a stride, and a bias; few, since each step plans all.
TARGETS = ["down_blocks.0.attentions.0.*", "down_blocks.0.downsamplers.0.conv", "conv_in"]
SEVERAL_SIZES = [THREE[0], {**THREE[1], "max_train_steps": 3}, {**THREE[2], "resolution": 64}]

# The last layer of the text encoder has adapters that no gradient reaches: they do not decay.
LEFT_OUT = {
    "clip_skip": 1,
    "text_encoder_targets": ["*.layers.*.self_attn.q_proj"],
    "adam_weight_decay": 0.5,
}
CLASS_IMAGES = {
    "with_prior_preservation": True,
    "class_data_dir": str(SAMPLES / "ring_robot"),
    "class_prompt": "a photo of a thing",
    "num_class_images": 5,
}


@pytest.mark.parametrize(
    ("entries", "settings"),
    [
        (THREE, {"train_text_encoder": True, "with_prior_preservation": True, **LEFT_OUT}),
        pytest.param(
            THREE,
            {"norm_axis": "input", "gradient_checkpointing": True, **CLASS_IMAGES},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SEVERAL_SIZES,
            {"use_dora": False, "cache_latents": False, "random_flip": True},
            marks=pytest.mark.slow,
        ),
        (
            THREE[:2],
            {"quantize": "nf4", "quantize_convolutions": True, "with_prior_preservation": True,
             "gradient_checkpointing": True, "train_text_encoder": True},
        ),
    ],
    ids=[
        "text encoders, image-free prior", "input axis, class images", "LoRA, several sizes",
        "quantised",
    ],
)  # fmt: skip
def test_in_float64_each_adapter_is_that_of_its_own_run(
    in_float64: None,
    entries: list[dict[str, Any]],
    settings: dict[str, Any],
    sd1_folder: Path,
    tmp_path: Path,
) -> None:
    own = {"targets": TARGETS, "max_train_steps": 3, **settings}
    configs = pack_of(sd1_folder, tmp_path / "pack", entries, **own)
    pack = train_pack(configs)
    assert not pack.failures
    assert {name: result.steps for name, result in pack.results.items()} == {
        name: config.max_train_steps for name, config in configs.items()
    }
    for name, config in configs.items():
        assert_alike(Path(config.output_dir), alone(configs, name), 1e-6)


def test_a_feature_from_outside_acts_on_each_subject(
    in_float64: None, sd1_folder: Path, tmp_path: Path
) -> None:
    kind = with_features(EXAMPLES / "t_lora.py")
    own = {"targets": TARGETS, "max_train_steps": 3}
    configs = {
        name: kind(**config.to_dict(), t_lora_least_rank=1)
        for name, config in pack_of(sd1_folder, tmp_path / "pack", THREE[:2], **own).items()
    }
    assert not train_pack(configs).failures
    for name, config in configs.items():
        own_run = alone(configs, name)
        of_own = records(own_run)
        assert_alike(Path(config.output_dir), own_run, 1e-6)
        settings = [
            read_config_file(Path(at) / "config.yaml") for at in (own_run, config.output_dir)
        ]
        assert [values["t_lora_least_rank"] for values in settings] == [1, 1]
        without = alone(configs, name, t_lora_least_rank=0, overwrite_output_dir=True)
        assert records(without) != of_own


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw-schedule-free"])
def test_subjects_have_optimizers_of_their_own(
    in_float64: None, optimizer: str, sd1_folder: Path, tmp_path: Path
) -> None:
    """And averages, which are their results."""
    needs_library(optimizer)
    entries = [{**THREE[0], "ema_decay": None, "optimizer": optimizer}, THREE[1]]
    configs = pack_of(sd1_folder, tmp_path / "pack", entries, targets=TARGETS, max_train_steps=3)
    assert not train_pack(configs).failures
    for name, config in configs.items():
        assert_alike(Path(config.output_dir), alone(configs, name), 1e-6)


def test_who_is_killed_and_resumed_or_fails_changes_nobody(
    sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pack: stopped at step 3 and resumed, with photos that break and a rate that diverges."""
    bad = shutil.copytree(small_samples() / "bolt_mug", tmp_path / "bad")
    entries = [
        *THREE[:1],
        {"name": "none", "instance_data_dir": str(tmp_path / "empty")},
        {"name": "broken", "instance_data_dir": str(bad)},
        {**THREE[2], "name": "wild", "learning_rate": 1e30},
        {**THREE[2], "num_validation_images": 1, "validation_steps": 1},
    ]
    (tmp_path / "empty").mkdir()
    configs = pack_of(
        sd1_folder, tmp_path / "pack", entries, checkpointing_steps=1, cache_latents=False,
        resume_from_checkpoint="latest", checkpoints_total_limit=1, targets=TARGETS,
    )  # fmt: skip
    left: dict[str, str] = {}

    def watch(name: str, event: Any) -> None:
        if isinstance(event, SubjectLeft):
            left[name] = event.reason
        if isinstance(event, StepDone) and name == "broken":
            for photo in bad.glob("*.jpg"):
                photo.unlink()
        if isinstance(event, StepDone) and name == "mug" and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train_pack(configs, watch)
    assert first.signal_number == signal.SIGTERM
    assert set(first.results) == {"mug", "other"}
    assert all(result.interrupted for result in first.results.values())
    assert set(left) == {"none", "broken", "wild"} == set(first.failures)
    assert "holds no" in left["none"] or "no photo" in left["none"]
    assert "not finite" in left["wild"] or "loss is" in left["wild"]
    second = train_pack({name: configs[name] for name in ("mug", "other")})
    assert {name: result.steps for name, result in second.results.items()} == {"mug": 4, "other": 4}
    whole = {"checkpointing_steps": 1, "resume_from_checkpoint": None}
    for name in ("mug", "other"):
        own = alone(configs, name, **whole)
        packed = Path(configs[name].output_dir)
        assert_alike(packed, own, 2e-4)
        states = [read_state(folder / "checkpoint-4") for folder in (packed, own)]
        shapes = [
            {key: moment.shape for key, moment in state["optimizer"]["state"][0].items()}
            for state in states
        ]
        assert shapes[0] == shapes[1], "a checkpoint of a pack is one of the subject's own run"
    # Who has a result and no checkpoint any more has ended.
    result, events = second.results["mug"], []
    shutil.rmtree(result.checkpoint)
    written = result.adapter.stat().st_mtime_ns
    ended = train_pack({"mug": configs["mug"]}, lambda name, event: events.append(event))
    assert ended.results["mug"].adapter == result.adapter
    assert (result.adapter.stat().st_mtime_ns, events) == (written, [])


@pytest.mark.parametrize(
    ("setting", "settings", "entry", "said"),
    [
        ("method", {"method": "full"}, {}, "of mug is not possible"),
        ("lora_dropout", {"lora_dropout": 0.1}, {}, "is not possible"),
        ("compile", {"compile": True}, {}, "is not possible"),
        ("targets", {}, {"targets": ["attention"]}, "must be the same in a pack; mug has"),
        ("norm_axis", {}, {"norm_axis": "input"}, "must be the same"),
    ],
)
def test_what_a_pack_cannot_do_is_refused_by_name(
    setting: str, settings: dict[str, Any], entry: dict[str, Any], said: str, tmp_path: Path
) -> None:
    entries = [THREE[0], {**THREE[1], **entry}]
    with refused(setting, said):
        check_pack(pack_of(tmp_path / "no model", tmp_path / "out", entries, **settings))
