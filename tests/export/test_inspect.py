"""The report on an adapter, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from tests.export.helpers import MakeAdapter


@pytest.fixture
def adapter(sd1_folder: Path, random_adapter: MakeAdapter) -> AdapterFile:
    layers = random_adapter(sd1_folder, every=7)
    return AdapterFile(layers, AdapterMetadata("sd1", "some/model", "sks dog", (512,)))


def test_inspect_prints_a_table_or_json(
    tmp_path: Path, sd1_folder: Path, adapter: AdapterFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    assert main(["inspect", str(path), "--base", str(sd1_folder)]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert f"fits yes, all {len(adapter.layers)} layers" in rows
    assert "A1111 wrong: it computes the norms per input" in rows
    assert "family Stable Diffusion 1 (sd1)" in rows
    assert "trigger sks dog" in rows
    assert "rank 4" in rows
    assert max(map(len, out.splitlines())) <= 80
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tools"]["LyCORIS"] == (
        'exact: with LycorisNetwork.LORA_PREFIX = "lora_unet", without which it finds no layer'
    )
    assert report["metadata"]["trigger"] == "sks dog"


def no_json_in_strings(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(no_json_in_strings, value.values()))
    if isinstance(value, list):
        return all(map(no_json_in_strings, value))
    return not (isinstance(value, str) and value.startswith(("{", "[")))
