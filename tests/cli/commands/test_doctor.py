"""``dora-diffusion doctor``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.cli.console import environment, trial
from dora_diffusion.cli.console.environment import Package
from dora_diffusion.cli.main import main
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.models.load import check_components

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported."""
    monkeypatch.setattr(environment, "packages", lambda: [Package("torch", "", ">=2", "2.5")])
    monkeypatch.setattr(environment, "ask", lambda names: dict.fromkeys(names, ("", None)))


@pytest.mark.usefixtures("quick")
def test_it_is_text_to_paste_or_json(tmp_path, capsys):
    assert main(["doctor", "--runs_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dora-diffusion")
    assert any(line.split() == ["packages", "torch", "2.5"] for line in lines)
    assert main(["doctor", "--json", "--runs_dir", str(tmp_path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"][0]["version"] == "2.5"
    assert facts["folders"]["runs"] in "\n".join(lines)


def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials run in this process, without the network."""
    monkeypatch.setattr(environment, "packages", lambda: [])

    def ask(names: list[str]) -> dict[str, object]:
        return {name: environment._answer(name) for name in names if "train_and" not in name} | {
            name: ("", "one step") for name in names if "train_and" in name
        }

    monkeypatch.setattr(environment, "ask", ask)


def test_a_base_model_that_is_not_whole_would_fail(sdxl_folder, tmp_path, capsys, monkeypatch):
    answering(monkeypatch)
    model = shutil.copytree(sdxl_folder, tmp_path / "model")
    flags = ["doctor", "--base", str(model), "--runs_dir", str(tmp_path)]
    assert main(flags) == 0
    assert f"is whole: {', '.join(PARTS)}" in capsys.readouterr().out
    (model / "unet" / "config.json").write_text("{", encoding="utf-8")
    assert main(flags) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert "unet/config.json is damaged; download the model again" in line
    (model / "unet" / "config.json").write_bytes((sdxl_folder / "unet/config.json").read_bytes())
    spoilt(model, "unet", "short")
    assert main(flags) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert "base model: unet: " in line
    assert line.endswith("; to fix it: download the model again, or give another one")
    assert main([*flags[:2], str(tmp_path / "nowhere" / "x"), *flags[3:]]) == 1
    assert "base model: " in capsys.readouterr().out


def spoilt(folder: Path, part: str, how: str) -> None:
    """Spoil a component's files."""
    weights = next((folder / part).glob("*.safetensors"), None)
    if weights is None:
        for path in (folder / part).glob("*"):
            path.unlink()
        return
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    if how == "lacks":
        del tensors[name]
    elif how == "differs":
        tensors[name] = tensors[name][:1].clone()
    if how == "short":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "gone":
        weights.unlink()
    else:
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("how", ["lacks", "differs", "short", "gone"])
@pytest.mark.parametrize("part", PARTS)
def test_each_component_is_checked_by_itself(part, how, sdxl_folder, tmp_path):
    """Without reading weights: a file of one component says nothing of the others."""
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    spoilt(model, part, how)
    found = check_components(str(model))
    assert list(found) == PARTS
    assert [name for name, problem in found.items() if problem] == [part]


def test_a_whole_model_is_checked_without_reading_a_weight(sd1_folder, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    export_checkpoint(str(sd1_folder), [], file)
    monkeypatch.setattr(
        "dora_diffusion.formats.files.stream.TensorReader.__getitem__",
        lambda *_: pytest.fail("a weight is read"),
    )
    for model in (sd1_folder, BaseModel(file, model_config=str(sd1_folder))):
        assert set(check_components(model).values()) == {""}


def test_the_trials_work_here():
    """The step and the image are real, of the embedded model."""
    assert trial.train_and_sample().startswith("one step, and images of ")
    assert trial.describe_device().startswith("cpu (CPU), which trains in ")
