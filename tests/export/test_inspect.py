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


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_inspect_prints_one_json_document(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, every=9, mixed_ranks=True)
    facts = AdapterMetadata("sd1", trigger="7", extra={"training_steps": "20"})
    write_adapter(tmp_path, AdapterFile(layers, facts), target)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert no_json_in_strings(report)
    assert report["metadata"]["trigger"] == "7"
    if target != "diffusers":  # which pads all layers to one rank, and notes their own
        assert report["rank"] == {name: layer.rank for name, layer in layers.items()}
        assert report["alpha"] == {name: layer.alpha for name, layer in layers.items()}
    else:
        assert set(report["rank"].values()) == {2, 3, 4}
    same = write_adapter(tmp_path / "b", AdapterFile(random_adapter(sd1_folder, every=9), facts))
    assert main(["inspect", str(same), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rank"], report["alpha"]) == (4, 3)
