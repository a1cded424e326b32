"""`benchmarks/gpu.sh`: parts that fail or take too long are written as such, and others go on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import psutil
import pytest
import torch

from tests.waiting import STAY, WAIT_SECONDS, wait_until

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, which sets up its process when it is imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    with mock.patch.dict(os.environ, DEVICE="cpu"):
        yield importlib.import_module("gpu")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_row_that_fails_says_why_and_the_next_one_is_measured(gpu):
    import gpu_parts

    def measure(batch: int) -> dict[str, object]:
        if batch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": 1.0 / (batch - 2)}

    rows = list(gpu_parts.rows_of([{"batch": 4}, {"batch": 2}, {"batch": 3}], measure))
    assert rows[0] == {"batch": 4, "failed": "out of memory"}
    assert rows[1] == {"batch": 2, "failed": "ZeroDivisionError: float division by zero"}
    assert rows[2] == {"batch": 3, "ms": 1.0}


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(gpu, tmp_path, monkeypatch):
    class Late(subprocess.Popen):
        """Runs into its limit when it has written a row."""

        def wait(self, timeout=None):
            if timeout != 3:
                return super().wait(timeout)
            wait_until(lambda: gpu.read(tmp_path / "tests.json"))
            raise subprocess.TimeoutExpired(self.args, timeout)

    slow = tmp_path / "slow.py"
    slow.write_text(
        "import json, os, pathlib, subprocess, sys\n"
        "path = pathlib.Path(sys.argv[2], 'row.json')\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STAY!r}])\n"
        "path.write_text(json.dumps({'rows': [{'ms': child.pid}]}), encoding='utf-8')\n"
        "os.replace(path, path.with_name(sys.argv[4] + '.json'))\n"
        f"{STAY}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "__file__", str(slow))
    monkeypatch.setattr(gpu.subprocess, "Popen", Late)
    gpu.start_part("tests", tmp_path, 3)
    written = gpu.read(tmp_path / "tests.json")
    assert written["problem"] == "stopped after 3 s"
    assert "Not complete: stopped after 3 s." in gpu.report(tmp_path)
    # What it has started would keep the device from the next part.
    _, alive = psutil.wait_procs(
        [p for p in psutil.process_iter() if p.pid == written["rows"][0]["ms"]],
        timeout=WAIT_SECONDS,
    )
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_tables_compare_to_lora_under_the_same_load_and_say_what_is_missing(gpu, tmp_path):
    def row(peer: str, batch: int, **results: object) -> dict[str, object]:
        return {"peer": peer, "batch": batch, "checkpointing": False, **results}

    rows = [
        row("PEFT LoRA", 1, ms=20.0), row("this DoRA", 1, ms=21.0), row("PEFT LoRA", 4, ms=50.0),
        row("this DoRA", 4, ms=60.0, **{"peak GiB": 9.5}),
        row("PEFT DoRA", 4, failed="out of\nmemory"),
    ]  # fmt: skip
    gpu.write(tmp_path / "steps-sd1.json", {"rows": rows})
    skipped = {"optimizer": "8-bit AdamW", "skipped": "bitsandbytes is not installed"}
    gpu.write(tmp_path / "adam8bit-sdxl.json", {"rows": [skipped]})
    expected = """
| peer | batch | checkpointing | ms | to PEFT LoRA | peak GiB |
| --- | --- | --- | --- | --- | --- |
| PEFT LoRA | 1 | no | 20.0 | 1.00 |  |
| this DoRA | 1 | no | 21.0 | 1.05 |  |
| PEFT LoRA | 4 | no | 50.0 | 1.00 |  |
| this DoRA | 4 | no | 60.0 | 1.20 | 9.5 |
| PEFT DoRA | 4 | no |  |  |  |

PEFT DoRA, 4, no: failed, out of memory
"""
    text = gpu.report(tmp_path)
    assert f"#### Training step, SD1.5 at 512 px, bf16\n{expected}" in text
    assert "8-bit AdamW: skipped, bitsandbytes is not installed" in text


def test_whoever_stops_it_has_the_report_of_what_was_done(gpu, tmp_path, monkeypatch):
    def start(name: str, folder: Path, limit: float) -> None:
        if name == "sampling-sd1":
            raise KeyboardInterrupt
        gpu.write(folder / f"{name}.json", {"rows": [{"ms": 3.5}], "complete": True})

    monkeypatch.setattr(gpu, "start_part", start)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    assert "| 3.5 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


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
    """Compiled blocks are traced, and none of them is made C++."""
    command = [str(BENCHMARKS / "gpu.sh"), "--output", str(tmp_path), "--minutes", "60"]
    done = subprocess.run(
        command, env=os.environ | {"DEVICE": "cpu", "PYTHON": sys.executable}, check=False
    )
    parts = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert all(part["complete"] for part in parts.values())
    rows = {name: part["rows"] for name, part in parts.items()}
    assert "3 passed" in rows.pop("tests")[0]["outcome"]
    eight_bit = rows["adam8bit-sdxl"].pop()
    if find_spec("bitsandbytes") is None:
        assert eight_bit["skipped"] == "bitsandbytes is not installed"
        assert done.returncode == 0
    assert all(row["ms"] > 0 for part in rows.values() for row in part)
    for family, loads in (("sd1", 2), ("sdxl", 3)):
        steps = rows[f"steps-{family}"]
        assert len({(r["peer"], r["batch"], r["checkpointing"]) for r in steps}) == 4 * loads
        peers = {row["peer"] for row in rows[f"compiled-{family}"]}
        assert peers == {"PEFT LoRA", "this DoRA"}
        assert [row["merged"] for row in rows[f"sampling-{family}"]] == [False] * 4 + [True]
        assert rows[f"sampling-{family}"][-1]["merging, s"] > 0
    assert all(row["finite"] for row in rows["fp16-sd1"])
    assert "#### Training step, SDXL at 1024 px" in (tmp_path / "gpu.md").read_text("utf-8")
