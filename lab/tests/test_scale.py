"""The arithmetic of many subjects, and that the documents have what it prints."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "lab" / "measurements" / "scale.md"
RECORDS = ROOT / "lab" / "measurements" / "scale-records.jsonl"

spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
scale = importlib.util.module_from_spec(spec)
sys.modules["scale"] = scale  # dataclasses look their module up
spec.loader.exec_module(scale)


def test_the_document_states_the_assumptions_of_the_tables():
    text, device = PAGE.read_text(encoding="utf-8"), scale.Device()
    for value in (
        f"{device.tflops} TFLOP/s, {device.bandwidth} TB/s",
        f"{device.utilisation:.0%} of the products' peak, {device.streaming:.0%} of the bandwidth",
        f"{device.dispatch * 1e6:.0f} us an operation",
        f"{scale.PACK_OF_FOUR} times the operations",
        f"{scale.WORKER_FAILURES} per GPU-hour",
        f"{scale.PHOTOS} photos of {scale.PHOTO_BYTES / 1e6:.0f} MB and {scale.FILES} files",
    ):
        assert value in text, value


def test_the_counts_are_those_that_the_other_documents_have():
    text = (ROOT / "lab" / "measurements" / "gpu-operations.md").read_text(encoding="utf-8")
    row = r"^\| this DoRA \| [\d,+ ]+ \| ([\d,]+) \| (\d+) \| ([\d.]+) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 6  # Stable Diffusion 1.5 and SDXL, then four transformers.
    for model, cells in zip(scale.MODELS.values(), rows[:2], strict=True):
        step, update, operands = (float(cell.replace(",", "")) for cell in cells)
        assert (model.operations, model.operands) == (step + update, operands)
    trained = "|".join(f"{model.trained:,}" for model in scale.MODELS.values())
    files = [*(ROOT / "lab").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
    pages = [page.read_text("utf-8") for page in files]
    stated = {count for page in pages for count in re.findall(trained, page)}
    assert len(stated) == len(scale.MODELS)


@pytest.mark.slow
def test_the_counts_are_those_of_the_models():
    done = subprocess.run(
        [sys.executable, "benchmarks/scale.py", "--count"],
        cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8",
    )  # fmt: skip
    for family, counted in json.loads(done.stdout).items():
        model = scale.MODELS[family]
        assert counted["unet"] == model.unet
        assert counted["vae"] == scale.VAE
        for name in ("forward", "backward", "decode"):
            assert getattr(model, name) == pytest.approx(counted[name], abs=5e-3)
