"""A model that two processes share is the model of one process."""

from __future__ import annotations

import os

import pytest
import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.processes import (
    make_accelerator,
    shards_model,
    wants_sharding,
)
from tests.refusal import refused


@pytest.fixture(autouse=True)
def torch_that_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older torch is refused before anything else is looked at."""
    monkeypatch.setattr("dora_diffusion.training.processes.has_sharding", lambda: True)


def test_a_torch_that_cannot_shard_is_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    with refused("sharding", "needs torch 2.7 or newer, this is 2.6.0"):
        wants_sharding(TrainConfig(sharding="fsdp"))


@pytest.mark.parametrize(
    ("changes", "launched", "reason"),
    [
        ({"sharding": "none"}, {"ACCELERATE_USE_FSDP": "true"}, "remove one of them"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported; add --fsdp_version 2"),
        (
            {},
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "--fsdp_offload_params true",
        ),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"sharding": "fsdp", "compile": True}, {}, "excludes compile"),
        ({"sharding": "fsdp", "offload": "model"}, {}, "excludes offload model"),
        (
            {"sharding": "fsdp", "method": "full", "optimizer": "adamw8bit"},
            {},
            "excludes optimizers but adamw",
        ),
        (
            {"sharding": "fsdp", "method": "full", "mixed_precision": "fp16"},
            {},
            "excludes mixed_precision fp16",
        ),
    ],
)
def test_what_sharding_excludes_is_refused_in_a_line(changes, launched, reason, monkeypatch):
    for variable, value in launched.items():
        monkeypatch.setenv(variable, value)
    with refused("sharding", reason):
        wants_sharding(TrainConfig(**changes))


def test_the_launcher_asks_for_sharding_too(monkeypatch):
    assert not wants_sharding(TrainConfig())
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert wants_sharding(TrainConfig())
    # Else Transformers reads no weights but in the first process.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_one_process_has_nothing_to_share(tmp_path):
    with pytest.warns(UserWarning, match="sharding fsdp has no effect because there is one"):
        accelerator = make_accelerator(
            TrainConfig(sharding="fsdp", output_dir=str(tmp_path), mixed_precision="no")
        )
    assert not shards_model(accelerator)
