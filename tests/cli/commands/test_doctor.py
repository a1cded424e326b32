"""``dora-diffusion env``."""

from __future__ import annotations

import json

import pytest

from dora_diffusion.cli.console import environment
from dora_diffusion.cli.console.environment import Package
from dora_diffusion.cli.main import main


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported."""
    monkeypatch.setattr(environment, "packages", lambda: [Package("torch", "", ">=2", "2.5")])
    monkeypatch.setattr(environment, "ask", lambda names: dict.fromkeys(names, ("", None)))


def test_it_is_text_to_paste_or_json(tmp_path, capsys):
    assert main(["env", "--runs_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dora-diffusion")
    assert any(line.split() == ["packages", "torch", "2.5"] for line in lines)
    assert main(["env", "--json", "--runs_dir", str(tmp_path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"][0]["version"] == "2.5"
    assert facts["folders"]["runs"] in "\n".join(lines)
