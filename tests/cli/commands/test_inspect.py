"""``dora-diffusion inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dora_diffusion.cli.main import main


def test_it_says_what_a_file_is_for_people_and_for_scripts(trained, capsys):
    assert main(["inspect", str(trained), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["method"], facts["key_format"], facts["rank"]) == ("DoRA", "diffusers", 2)
    assert main(["inspect", str(trained)]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    assert ["trigger", "sks mug"] in rows
    assert ["family", "Stable Diffusion 1 (sd1)"] in rows
    assert ["rank", "2"] in rows


def test_something_else_is_one_line(tmp_path, last_line):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no adapter file in it" in last_line()


def test_one_of_several_files_is_asked_for(
    lora: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(lora.read_bytes())
    assert main(["inspect", str(tmp_path)]) == 1
    assert "name one of its files: a.safetensors, b.safetensors" in last_line()
