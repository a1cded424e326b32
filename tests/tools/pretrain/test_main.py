"""The command line of the pretraining, and the commands that the cards name."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dora_diffusion.models.embedded import MODELS, model_folder
from tools.pretrain.__main__ import STAGES, _parser

ROOT = Path(__file__).parents[3]


def test_the_shares_of_a_budget_are_all_of_it() -> None:
    for name in MODELS:
        assert sum(stage.share for stage in STAGES[name]) == pytest.approx(1)
        assert sum(stage.share for stage in STAGES[name] if not stage.kept) > 0


def test_it_starts_from_the_clone() -> None:
    command = [sys.executable, "-m", "tools.pretrain", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.startswith("usage: python -m tools.pretrain")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["shipped", "template"])
def test_the_commands_of_a_card_parse(name: str, which: str) -> None:
    template = ROOT / "tools" / "pretrain" / "cards" / f"{name}.md"
    card = template if which == "template" else model_folder(name) / "README.md"
    text = re.sub(r"\{\w+:\.0f\}", "140", card.read_text(encoding="utf-8"))
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    python -m")]
    assert commands
    for command in commands:
        assert command[:3] == ["python", "-m", "tools.pretrain"]
        assert _parser().parse_args(command[3:]).model == name
