"""Which checkpoints there are, and which one is meant."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dora_diffusion.config import ConfigError
from dora_diffusion.training.checkpoint import (
    STATE_FILE,
    checkpoints_after,
    checkpoints_in,
    find_checkpoint,
    folders_after,
)
from dora_diffusion.training.loop import train


def test_without_checkpoints_the_advice_does_not_name_one(tiny_run):
    config = tiny_run(checkpointing_steps=0)
    train(config)
    with pytest.raises(ConfigError) as error:
        train(config)
    assert "no checkpoint to resume from (a run with --checkpointing_steps 0 keeps none)" in str(
        error.value
    )
    assert "--overwrite_output_dir" in str(error.value)
    assert "resume_from_checkpoint" not in str(error.value)
    with pytest.raises(ConfigError, match="start over with --overwrite_output_dir"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_checkpoints_are_listed_by_step_and_only_where_they_are_whole(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", ".checkpoint-11.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert [path.name for path in checkpoints_after(tmp_path, 9)] == ["checkpoint-10"]
    assert [path.name for path in folders_after(tmp_path, 9)] == ["checkpoint-10", "checkpoint-12"]
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(ConfigError, match="checkpoint-12 is not a checkpoint of a training run"):
        find_checkpoint("checkpoint-12", tmp_path)
