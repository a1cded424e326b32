"""``dora-diffusion push``: private unless asked otherwise; the rest is tested with the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli.main import main

ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Files and names that were given to the hub."""
    calls: list[tuple[Any, ...]] = []

    def push(folder: Path, repository: str, **options: Any) -> str:
        calls.append((folder, repository, *options.values()))
        return "https://hub/me/mug"

    monkeypatch.setattr("dora_diffusion.export.hub.push", push)
    return calls


@pytest.mark.parametrize(("flags", "private"), [((), True), (("--public",), False)])
def test_what_is_asked_for_is_pushed(
    flags: tuple[str, ...],
    private: bool,
    pushed: list[tuple[Any, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["push", "run", "me/mug", *flags]) == 0
    assert pushed == [(Path("run"), "me/mug", private, None, None)]
    assert capsys.readouterr().out == "https://hub/me/mug\n"


def test_another_checkpoint_has_a_card_of_its_own(
    trained: Path, tmp_path: Path, pushed: list[tuple[Any, ...]]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoint-3").mkdir()
    other = Path(shutil.copy(run / ADAPTER, run / "checkpoint-3"))
    (run / "README.md").write_text("the trainer's", encoding="utf-8")
    for adapter in (run / ADAPTER, other):
        assert main(["push", str(run), "me/mug", "--adapter", str(adapter)]) == 0
    assert pushed[0] == (run, "me/mug", True, run / ADAPTER, "the trainer's")
    card = pushed[1][-1]
    assert pushed[1][3] == other
    assert "# sks mug" in card
    assert "for 3 steps" in card
