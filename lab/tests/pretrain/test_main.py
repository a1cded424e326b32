"""The command line of the pretraining, and the commands that the cards name."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.models.embedded import MODELS, model_folder
from lab.pretrain import diffusion
from lab.pretrain.__main__ import STAGES, _epsilon_diffusion, _parser
from lab.pretrain.start import prepare_to_go_on

ROOT = Path(__file__).parents[3]


def test_the_shares_of_a_budget_are_all_of_it() -> None:
    for stages in STAGES.values():
        assert sum(stage.share for stage in stages) == pytest.approx(1)
        assert sum(stage.share for stage in stages if not stage.kept) > 0


def test_it_starts_from_the_clone() -> None:
    command = [sys.executable, "-m", "lab.pretrain", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.startswith("usage: python -m lab.pretrain")


def test_the_twin_starts_as_tiny_sd_but_for_what_it_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = set()

    def train(model: Any, work: Path, minutes: float, export: Any, *_: Any, **__: Any) -> None:
        trained.update(
            name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad
        )
        export(model, work, work / "pipeline")

    monkeypatch.setattr(diffusion, "train_diffusion", train)
    prepare_to_go_on("tiny-sd", tmp_path)
    _epsilon_diffusion(tmp_path, 1.0)
    assert trained == {"unet", "attribute_heads"}
    scheduler = Path("scheduler", "scheduler_config.json")
    told, shipped = (
        json.loads((folder / scheduler).read_text(encoding="utf-8"))
        for folder in (tmp_path / "pipeline", model_folder("tiny-sd"))
    )
    assert told == {**shipped, "prediction_type": "epsilon"}
    for weights in model_folder("tiny-sd").rglob("*.safetensors"):
        own = load_file(tmp_path / "pipeline" / weights.relative_to(model_folder("tiny-sd")))
        for name, tensor in load_file(weights).items():
            assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["shipped", "template"])
def test_the_commands_of_a_card_parse(name: str, which: str) -> None:
    template = ROOT / "lab" / "pretrain" / "cards" / f"{name}.md"
    card = template if which == "template" else model_folder(name) / "README.md"
    text = re.sub(r"\{\w+:\.0f\}", "140", card.read_text(encoding="utf-8"))
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    python -m")]
    assert commands
    for command in commands:
        assert command[:3] == ["python", "-m", "lab.pretrain"]
        assert _parser().parse_args(command[3:]).model == name
