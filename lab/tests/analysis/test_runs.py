"""Analyses of runs that train whole weights, or the token embedding."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion import train
from lab.analysis import analyze_weights
from tests.integration.test_token_embedding import TABLE, dense, settings
from tests.training.helpers import make_config


def test_full_fine_tuning_is_analyzed_by_its_checkpoints(sd1_folder, small_photos, tmp_path):
    config = make_config(
        sd1_folder, small_photos, tmp_path / "run", method="full", max_train_steps=3,
        checkpointing_steps=2,
    )  # fmt: skip
    analysis = analyze_weights([train(config).output_dir], str(sd1_folder))
    steps = [row["step"] for row in analysis.to_dict()["runs"][0]["checkpoints"]]
    assert steps == [2, 3]


def test_a_token_embedding_is_an_ordinary_layer(
    sd1_folder: Path, small_photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(settings(sd1_folder, small_photos, run))
    (change,) = analyze_weights(run, sd1_folder, layers=[TABLE]).runs[0].checkpoints[0].layers
    table, wanted = (tensor.t() for tensor in dense(sd1_folder, run, TABLE))
    moved = (wanted.norm(dim=1) - table.norm(dim=1)).abs().mean().item()
    assert change.shape == tuple(table.shape)
    assert change.delta_m == pytest.approx(moved, rel=1e-5)
    assert change.low_rank is not None
    assert len(change.low_rank.leading) == settings(sd1_folder, small_photos, run).rank
