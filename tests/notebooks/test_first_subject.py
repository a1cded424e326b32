"""The notebook: from photos to a file for ComfyUI, run top to bottom as a person does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.adapter.stored import StoredAdapter

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "first_subject.ipynb"


def code() -> dict[str, str]:
    """Its code by the ids of the cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def test_it_is_kept_without_results_and_one_line_chooses_the_model() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert code()["model"] == 'MODEL = "embedded:tiny-sd"'
    rest = "\n".join(text for name, text in code().items() if name != "model")
    # Everything else follows the one line, by whether the model is an embedded one.
    assert rest.count("embedded:") == rest.count('MODEL.startswith("embedded:")') == 1


@pytest.mark.slow
def test_it_makes_a_file_for_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat: Any = pytest.importorskip("nbformat")
    nbclient: Any = pytest.importorskip("nbclient")
    jupyter: Any = pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [train] = [cell for cell in notebook.cells if cell.id == "train"]
    assert '"max_train_steps": 300' in train.source
    train.source = train.source.replace('"max_train_steps": 300', '"max_train_steps": 2')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # The kernel of this interpreter, whatever kernels the machine knows.
    kernels = jupyter.AsyncKernelManager(kernel_name="python3")
    kernels.kernel_spec.argv[0] = sys.executable
    client = nbclient.NotebookClient(
        notebook, km=kernels, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=dict(os.environ))
    made = StoredAdapter.open(tmp_path / "subject.safetensors")
    assert made.layout.name == "comfyui"
    magnitudes = [key for file in made.files for key in file.specs if key.endswith(".dora_scale")]
    assert len(magnitudes) == len(read_adapter(tmp_path / "subject").layers) > 100
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 3 + 4
