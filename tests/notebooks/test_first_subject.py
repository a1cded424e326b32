"""The notebook: from photos to a file for ComfyUI, run top to bottom as a person does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.adapter.stored import StoredAdapter
from dora_diffusion.training.events import StepDone, TrainingStarted

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


@pytest.mark.parametrize(
    ("files", "address", "source"),
    [
        (("../pyproject.toml",), "", ".."),
        (("../pyproject.toml", "dora_diffusion-0.1.0.whl"), "", "dora_diffusion-0.1.0.whl"),
        ((), "https://example.org/repo", "git+https://example.org/repo"),
        ((), "", ""),
    ],
)
def test_its_first_cell_installs_the_wheel_beside_it_or_the_clone_around_it(
    files: tuple[str, ...],
    address: str,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transform: Any = pytest.importorskip("IPython.core.inputtransformer2")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for name in files:
        Path(name).touch()
    monkeypatch.setitem(sys.modules, "dora_diffusion", None)
    cell = code()["install"].replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    program = transform.TransformerManager().transform_cell(cell)
    calls: list[str] = []
    names: dict[str, Any] = {}

    def magic(name: str, line: str) -> None:
        calls.append(f"{name} {line.format(**names)}")

    names["get_ipython"] = lambda: SimpleNamespace(run_line_magic=magic)
    if source:
        exec(program, names)
        assert calls == [f"pip install --quiet {source}"]
    else:  # Colab, where nobody has uploaded the wheel.
        with pytest.raises(FileNotFoundError, match=r"upload the wheel .*run this cell again"):
            exec(program, names)
        assert calls == []
    assert (ROOT / "notebooks" / ".." / "pyproject.toml").is_file()


def test_its_training_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dora_diffusion

    def train(config: Any, on_event: Any) -> Any:
        on_event(
            TrainingStarted(
                family="Stable Diffusion 1", device="cpu", photos=5, resolutions=(64,), step=0,
                total_steps=config.max_train_steps, adapter="a DoRA", schedule="epsilon",
                trigger="sks mug", resumed_from=None, steps_dropped=0, changed={}, unused={},
            )
        )  # fmt: skip
        for step in range(config.max_train_steps):
            on_event(StepDone(step + 1, config.max_train_steps, 0.5, {}))
        return SimpleNamespace(steps=config.max_train_steps, adapter="subject")

    monkeypatch.setattr(dora_diffusion, "train", train)
    given = {"MODEL": "embedded:tiny-sd", "PHOTOS": Path("mug"), "TOKEN": "sks", "CLASS": "mug"}
    exec(code()["train"], given)
    shown = capsys.readouterr()
    assert "5 photos at 64 px" in shown.out
    assert "300/300" in shown.err
    assert "loss=0.5000" in shown.err


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
    shown = "".join(output.get("text", "") for output in train.outputs)
    assert "2/2" in shown
    assert "loss=" in shown
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
