"""`benchmarks/gpu.sh`: parts that fail or take too long are written as such, and others go on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("DEVICE", "cpu")
    spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_that_fails_says_why_and_the_next_one_is_measured(gpu):
    def measure(batch: int) -> dict[str, object]:
        if batch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 1.0 / (batch - 2)}

    rows = list(gpu.rows_of([{"batch": 4}, {"batch": 2}, {"batch": 3}], measure))
    assert rows[0] == {"batch": 4, "failed": "out of memory"}
    assert rows[1] == {"batch": 2, "failed": "ZeroDivisionError: float division by zero"}
    assert rows[2] == {"batch": 3, "ms": 1.0}


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(gpu, tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import json, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[2], sys.argv[4] + '.json')\n"
        "path.write_text(json.dumps({'rows': [{'ms': 1}]}), encoding='utf-8')\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "__file__", str(slow))
    gpu.start_part("tests", tmp_path, 3)
    assert gpu.read(tmp_path / "tests.json") == {
        "rows": [{"ms": 1}],
        "problem": "stopped after 3 s",
    }
    assert "Not complete: stopped after 3 s." in gpu.report(tmp_path)


def test_a_second_start_does_what_is_missing(gpu, tmp_path, monkeypatch):
    done = {"rows": [{"peer": "frozen", "ms": 3.5}], "complete": True}
    started = []

    def start(name: str, folder: Path, limit: float) -> None:
        started.append(name)
        gpu.write(folder / f"{name}.json", {"problem": "ended with code 1"})

    gpu.write(tmp_path / "steps-sd1.json", done)
    monkeypatch.setattr(gpu, "start_part", start)
    parts = ["steps-sd1", "sampling-sd1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--parts", *parts])
    assert gpu.main() == 1
    assert started == ["sampling-sd1"]
    figures = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert figures["parts"]["steps-sd1"] == done
    assert figures["about"]["torch"] == torch.__version__
    assert "| frozen | 3.5 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_part_runs_at_tiny_widths(tmp_path):
    """All but what is compiled, and the library of 8-bit AdamW, which is not installed."""
    parts = ["steps-sd1", "sampling-sdxl", "fp16-sd1", "adam8bit-sdxl", "tests"]
    command = [str(BENCHMARKS / "gpu.sh"), "--output", str(tmp_path), "--minutes", "30"]
    subprocess.run(
        [*command, "--parts", *parts],
        env=os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable},
        check=False,
    )
    figures = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert all(figures[part]["complete"] for part in parts)
    failed = {
        part: [row["failed"] for row in figures[part]["rows"] if "failed" in row] for part in parts
    }
    assert [part for part in parts if failed[part]] == ["adam8bit-sdxl"]
    assert "bitsandbytes" in failed["adam8bit-sdxl"][0]
    steps = figures["steps-sd1"]["rows"]
    assert len({(row["peer"], row["batch"]) for row in steps}) == 8
    assert all(row["ms"] > 0 for row in steps)
    assert figures["fp16-sd1"]["rows"][1]["finite"]
