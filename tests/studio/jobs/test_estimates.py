"""Estimates of a run's time, measured in earlier runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.models.memory import Device
from dora_diffusion.studio.app import html
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.estimates import estimate
from dora_diffusion.studio.jobs.snapshot import snapshot
from dora_diffusion.studio.jobs.store import Workspace, write_json
from tests.studio.jobs.helpers import (
    started_run,
)


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "adafactor"}, {"offload": "none"}, {"rank": 64}, {"conv_rank": 64},
     {"gradient_accumulation_steps": 4}, {"lora_dropout": 0.1}, {"targets": ["all"]},
     {"with_prior_preservation": True}, {"method": "lora"}],
    ids=str,
)  # fmt: skip
def test_a_run_that_takes_another_time_or_memory_is_not_like_this(
    workspace: Workspace, changes: dict[str, Any]
) -> None:
    folder = started_run(workspace, 4)
    write_json(folder / records.RESULT, {"code": 143, "peak_memory": 3.5})
    jobs = snapshot(workspace.root)
    like = TrainConfig(max_train_steps=7, learning_rate=1e-3, seed=5)
    other = TrainConfig(max_train_steps=7, **changes)
    found = [estimate(one, jobs, workspace.root, Device()) for one in (like, other)]
    assert [(one.seconds, one.memory, one.runs) for one in found] == [
        (14.0, 3.5, 1), (None, None, 0),
    ]  # fmt: skip


def test_estimates_are_measured_or_unknown(workspace: Workspace) -> None:
    folder = started_run(workspace, 4)
    write_json(folder / records.RESULT, {"code": 143, "peak_memory": 3.5})
    same, other = TrainConfig(max_train_steps=100), TrainConfig(train_batch_size=3)
    device = Device(free_gib=3.0)
    found = estimate(same, snapshot(workspace.root), workspace.root, device)
    assert (found.seconds, found.memory, found.runs) == (200.0, 3.5, 1)
    assert found.will_not_fit
    assert "This will not fit" in html.estimate_card(found, 10)
    unknown = estimate(other, snapshot(workspace.root), workspace.root, device)
    assert (unknown.seconds, unknown.memory, unknown.runs) == (None, None, 0)
    card = html.estimate_card(dataclasses.replace(unknown, seconds=60.0), 10)
    assert "Time is that of a run like this" in card
    assert "No run like this" not in card
    card = html.estimate_card(unknown, 10)
    assert "known after the first steps" in card
    assert "will not fit" not in card
