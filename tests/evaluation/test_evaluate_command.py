"""``dora-diffusion evaluate`` from a two-step adapter to table, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.cli import main
from dora_diffusion.evaluation.measures import MEASURES
from dora_diffusion.evaluation.report import SCHEMA

ROOT = Path(__file__).parents[2]
BASE = "embedded:tiny-sd"
FAST = ["--steps", "1", "--guidance_scale", "1"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "adapter"
    flags = [
        "--config", str(ROOT / "samples" / "bolt_mug" / "config.yaml"),
        "--instance_data_dir", str(ROOT / "samples" / "bolt_mug"),
        "--max_train_steps", "2", "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
        "--learning_rate", "1e-2", "--train_batch_size", "1", "--num_validation_images", "0",
        "--output_dir", str(output),
    ]  # fmt: skip
    assert main(["train", *flags]) == 0
    return output


def test_a_subject_of_the_toy_world(adapter, tmp_path, capsys) -> None:
    flags = ["--base", BASE, "--subject", "bolt_mug", "--num_seeds", "1", "--output", str(tmp_path)]
    assert main(["evaluate", str(adapter), *flags, *FAST]) == 0
    printed = capsys.readouterr().out
    assert "| subject similarity" in printed
    assert str(tmp_path / "pictures.png") in printed
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["schema"] == SCHEMA
    assert (report["base"], report["adapter"], report["trigger"]) == (BASE, "adapter", "sks mug")
    assert report["sampling"] == {"steps": 1, "guidance_scale": 1.0, "scheduler": None}
    assert set(report["measures"]) <= set(MEASURES)
    assert {"subject_similarity", "background", "side", "others_kind", "denoising_loss"} <= set(
        report["measures"]
    )
    loss = report["measures"]["denoising_loss"]
    assert loss["base"]["mean"] != loss["adapted"]["mean"]
    assert report["measures"]["subject_similarity"]["truth"]["mean"] > 0.85
    assert printed.splitlines()[0] in (tmp_path / "scores.md").read_text()
    with Image.open(tmp_path / "pictures.png") as picture:
        assert picture.width > 1000


def test_photos_with_metric_models_as_json(
    adapter, tmp_path, capsys, clip_folder, dino_folder, held_out_photos
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {} on grass\n\n{} at night\n")
    flags = ["--base", BASE, "--subject", str(held_out_photos), "--num_seeds", "2", "--json"]
    flags += ["--metric_model", str(clip_folder), str(dino_folder), "--prompts", str(prompts)]
    assert main(["evaluate", str(adapter), *flags, *FAST, "--output", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "scores.json").read_text())
    assert report["subject"] == "held-out"
    measures = report["measures"]
    assert {"subject_similarity@tiny-dino", "prompt_similarity@tiny-clip"} <= set(measures)
    assert measures["subject_similarity@tiny-dino"]["adapted"]["n"] == 4
    assert measures["others_change@tiny-dino"]["base"]["mean"] == pytest.approx(0, abs=1e-6)
    assert measures["others_change@tiny-dino"]["adapted"]["mean"] > 0
    assert report["notes"] == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--subject", "nobody"], "neither a folder of photos nor one of moon_robot"),
        (["--subject", "bolt_mug", "--metric_model", "x"], "--metric_model is for photos"),
        (["--subject", "bolt_mug", "--num_seeds", "0"], "num_seeds is 0"),
        (["--subject", "bolt_mug", "--prompts", "nowhere"], "nowhere is not a file of prompts"),
        (["--subject", ".", "--metric_model", "./nowhere"], "./nowhere does not exist"),
    ],
)
def test_wrong_calls_end_in_one_line(adapter, tmp_path, capsys, monkeypatch, flags, text) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(adapter), "--base", BASE, *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error
