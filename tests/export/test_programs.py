"""Single files that say to other programs what the model predicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.cli.main import main
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import (
    export_checkpoint,
    inspect_model,
    programs,
    verify_checkpoint,
)
from dora_diffusion.models.load import load_components

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture
def predicting(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Tiny models of a family with another prediction type, which are taken for released ones."""
    monkeypatch.setattr(programs, "has_released_shape", lambda model: True)

    def make(family: str, prediction: str, **more: Any) -> Path:
        base = tmp_path / f"{family}-{prediction}"
        shutil.copytree(request.getfixturevalue(f"{family}_folder"), base)
        file = base / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        text = json.dumps({**config, "prediction_type": prediction, **more})
        file.write_text(text, encoding="utf-8")
        return base

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_each_file_says_what_it_predicts_to_each_program(
    family: str, prediction: str, predicting: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    base = predicting(family, prediction)
    export_checkpoint(base, (), file)
    keys, is_v = load_file(file), prediction == "v_prediction"
    if family == "sd2":  # InvokeAI's rule
        step = keys.get("global_step")
        assert (step is None or bool(step != 220000)) == is_v
    if family == "sdxl":  # ComfyUI's
        assert ("v_pred" in keys) == is_v
    report = inspect_model(file)
    assert tuple(report.tools) == ("diffusers", "ComfyUI", "Forge", "A1111", "InvokeAI")
    assert report.notes == []
    assert ("v-prediction" if is_v else "epsilon prediction") in report.schedule
    # And to this program, whose bits are the base's.
    again = export_checkpoint(file, (), tmp_path / "again.safetensors")
    assert load_file(again).keys() == keys.keys()
    assert not file.with_suffix(".yaml").exists()


def test_a_file_with_the_step_is_proven(
    predicting: Callable[..., Path], tmp_path: Path, random_adapter: Any
) -> None:
    from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter

    base = predicting("sd2", "epsilon")
    adapter = write_adapter(tmp_path / "a", AdapterFile(random_adapter(base, every=20)))
    merged = export_checkpoint(base, adapter, tmp_path / "m.safetensors")
    assert verify_checkpoint(merged, base, adapter).problems == []
    assert inspect_model(merged).adapters == [(adapter.name, 1.0)]


def test_export_and_inspect_end_with_what_each_program_makes_of_it(
    predicting: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = predicting("sdxl", "v_prediction", rescale_betas_zero_snr=True)
    file = tmp_path / "mug.safetensors"
    assert main(["export", "--base", str(base), "--output", str(file)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{file} (reopened and checked)"
    assert lines[1:4] == [
        "ComfyUI, Forge: exact",
        "A1111: exact if told so: by a YAML file of its name beside it, with its prediction type",
        "InvokeAI: wrong: it takes one file for a noise model; give it the exported folder",
    ]
    assert lines[4].startswith("note: zero terminal SNR: in A1111 choose it")
    assert main(["inspect", str(file), "--base", str(base)]) == 0
    out, err = capsys.readouterr()
    assert "base has no effect because" in err
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "family Stable Diffusion XL (sdxl)" in rows
    assert "ComfyUI exact" in rows
    assert main(["inspect", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["is_single_file"], facts["tools"]["ComfyUI"]) == (
        "sdxl", True, "exact",
    )  # fmt: skip
    assert main(["inspect", str(base)]) == 0
    assert "Diffusers folder" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '{"name": 1}', '[{"adapter": 1}]'])
def test_damaged_metadata_is_not_believed(text: str, sd1_folder: Path, tmp_path: Path) -> None:
    file = export_checkpoint(sd1_folder, (), tmp_path / "m.safetensors")
    fields = {f"dora_diffusion.{name}": text for name in ("base", "merged")}
    save_file(load_file(file), file, fields)
    report = inspect_model(file)
    assert (report.base, report.adapters) == ("1" if "name" in text else "", [])
    with pytest.raises(ValueError, match="does not have the shapes of"):
        load_components(file)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_a_merged_embedded_model_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    """The message names the flag that loads it, which does."""
    base = f"embedded:{name}"
    file = export_checkpoint(base, (), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="the shapes of a released Stable Diffusion") as raised:
        load_components(file)
    assert "damaged" not in str(raised.value)
    assert str(raised.value).endswith(f" folder with its shapes, such as its base model's: {base}")
    assert (
        load_components(BaseModel(file, model_config=base)).family == load_components(base).family
    )
