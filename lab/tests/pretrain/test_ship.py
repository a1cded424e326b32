"""Training on a model's card: minutes, steps and machines of all its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dora_diffusion.models.embedded import model_folder
from lab.pretrain.ship import training_facts
from lab.pretrain.start import goes_on, prepare_to_go_on


def test_what_was_spent_before_is_counted_once(tmp_path: Path) -> None:
    before = json.loads((model_folder("tiny-sd") / "training.json").read_text(encoding="utf-8"))
    prepare_to_go_on("tiny-sd", tmp_path)
    prepare_to_go_on("tiny-sd", tmp_path)
    torch.save({"seconds": 90.0, "step": 7}, tmp_path / "diffusion.pt")
    facts = training_facts(tmp_path, "an abacus")
    assert facts["machine"] == before["machine"] + " and an abacus"
    assert facts["diffusion_minutes"] == pytest.approx(before["diffusion_minutes"] + 1.5)
    assert facts["diffusion_steps"] == before["diffusion_steps"] + 7
    assert facts["vae_steps"] == before["vae_steps"]
    assert (tmp_path / "vae" / "config.json").is_file()


def test_a_new_training_counts_itself_alone(tmp_path: Path) -> None:
    torch.save({"seconds": 90.0, "step": 7}, tmp_path / "diffusion.pt")
    assert not goes_on(tmp_path)
    facts = training_facts(tmp_path, "an abacus")
    assert facts == {"machine": "an abacus", "diffusion_minutes": 1.5, "diffusion_steps": 7}
