"""``python -m lab analyze`` from a short run to tables, JSON, CSV and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.__main__ import main
from lab.analysis import analyze_weights
from lab.analysis.report import SCHEMA


def test_a_run_is_told_of_in_tables_and_files(
    trained: Path, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    last_line: Callable[[], str],
) -> None:  # fmt: skip
    command = ["analyze", str(trained), "--base", str(sd1_folder), "--output", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    names = {"analysis.json", "analysis.md", "layers.csv", "scatter.png", "heat-map.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(str(tmp_path / name) in printed for name in names)
    assert "| run (DoRA) | step 3" in printed
    report = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    expected = analyze_weights(trained, sd1_folder)
    assert report == json.loads(json.dumps(expected.to_dict()))
    assert report["schema"] == SCHEMA
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(expected.runs[0].checkpoints[0].layers)
    # What is there is kept.
    assert main(command) == 1
    assert last_line() == (
        f"error: {tmp_path} already contains an analysis; choose another --output, or --overwrite"
    )
    assert main([*command, "--overwrite", "--norm_axis", "input", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["norm_axis"] == "input"
    assert again == json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert (
        again["runs"][0]["checkpoints"][0]["delta_m"]
        != (report["runs"][0]["checkpoints"][0]["delta_m"])
    )


def test_layers_are_chosen_by_patterns(trained: Path, sd1_folder: Path, tmp_path: Path) -> None:
    command = ["analyze", str(trained), "--base", str(sd1_folder), "--output", str(tmp_path)]
    assert main([*command, "--layers", "*.attn2.to_q", "*.attn2.to_k"]) == 0
    layers = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))["runs"][0][
        "checkpoints"
    ][0]
    assert {name.rpartition(".")[2] for name in layers["by_layer"]} == {"to_q", "to_k"}


def test_a_mistake_is_one_line(
    trained: Path, sd1_folder: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    command = ["analyze", "--base", str(sd1_folder), "--output", str(tmp_path / "out")]
    assert main([*command, str(trained), "--layers", "*.to_x"]) == 1
    assert last_line().startswith("error: run: no layer matches *.to_x; it has unet.")
    assert main([*command, str(tmp_path / "nothing.safetensors")]) == 1
    assert "there is no adapter at" in last_line()
    assert not (tmp_path / "out").exists()


def test_sources_are_called_by_their_titles(
    trained: Path, sd1_folder: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    command = ["analyze", str(trained), "--base", str(sd1_folder), "--output", str(tmp_path)]
    assert main([*command, "--title", "My mug"]) == 0
    report = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in report["runs"]] == ["My mug"]
    assert "| My mug (DoRA)" in (tmp_path / "analysis.md").read_text(encoding="utf-8")
    assert main([*command, "--overwrite", "--title", "a", "b"]) == 1
    assert last_line() == "error: 2 titles for 1 sources; give one for each"
