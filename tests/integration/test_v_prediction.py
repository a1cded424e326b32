"""A checkpoint that predicts v up to pure noise, and does not say so: from training to other files.

Nothing is fetched, and no configuration is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from dora_diffusion.cli import main as cli
from dora_diffusion.export import export_checkpoint
from dora_diffusion.models.embedded import samples_folder

ASKED = ["--prediction_type", "v_prediction", "--zero_terminal_snr"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    return command


def keys_of(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def test_what_a_run_was_told_reaches_images_and_files(
    sdxl_folder: Path, tiny_released: Path, tmp_path: Path, run: Any
) -> None:
    base, adapter = (
        export_checkpoint(sdxl_folder, [], tmp_path / "base.safetensors"),
        tmp_path / "run",
    )
    said = run(
        "train", "--pretrained_model_name_or_path", base, *ASKED, "--instance_data_dir",
        samples_folder() / "bolt_mug", "--instance_prompt", "a photo of a sks mug", "--output_dir",
        adapter, "--max_train_steps", 2, "--learning_rate", 1e-3, "--num_validation_images", 0,
    )  # fmt: skip
    assert "v-prediction with zero terminal SNR, by the flags given" in said

    def image(name: str, *words: object) -> tuple[Any, str]:
        common = (
            "--prompt",
            "a photo of a sks mug",
            "--seed",
            1,
            "--steps",
            3,
            "--guidance_scale",
            3,
        )
        line = run("generate", *words, *common, "--output", tmp_path / f"{name}.png")
        return np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), float), line

    plain, said = image("plain", "--base", base, "--adapter", adapter)
    assert "v-prediction with zero terminal SNR, by the adapter's metadata" in said
    assert plain.std() > 2, "neither black nor of one colour"
    told, _ = image("told", "--base", base, "--adapter", adapter, *ASKED)
    assert (plain == told).all()
    other, _ = image("other", "--base", base, "--adapter", adapter, "--no-zero_terminal_snr")
    assert abs(plain - other).max() > 3

    merged, folder = tmp_path / "merged.safetensors", tmp_path / "merged"
    run("export", "--base", base, "--adapter", adapter, "--output", merged)
    assert keys_of(merged) == keys_of(base) | {"v_pred", "ztsnr"}
    assert "verified" in run("verify", merged, "--base", base, "--adapter", adapter)
    from_file, said = image("merged", "--base", merged)
    assert "by the file's v_pred and ztsnr" in said
    assert abs(from_file - plain).max() <= 2
    run("export", "--base", base, "--adapter", adapter, "--output", folder)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    expected = {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    assert scheduler.items() >= expected.items()
    from_folder, _ = image("folder", "--base", folder)
    assert (from_folder == from_file).all()


def test_full_fine_tuning_marks_its_file(
    sdxl_folder: Path, tiny_released: Path, tmp_path: Path, run: Any
) -> None:
    base, output = (
        export_checkpoint(sdxl_folder, [], tmp_path / "base.safetensors"),
        tmp_path / "run",
    )
    run(
        "train", "--pretrained_model_name_or_path", base, *ASKED, "--instance_data_dir",
        samples_folder() / "bolt_mug", "--instance_prompt", "a photo of a sks mug", "--output_dir",
        output, "--max_train_steps", 1, "--method", "full", "--single_file", "--targets", "*.to_q",
        "--full_weights", "targets", "--num_validation_images", 0, "--checkpointing_steps", 0,
    )  # fmt: skip
    assert keys_of(output / "model.safetensors") == keys_of(base) | {"v_pred", "ztsnr"}
    scheduler = output / "model" / "scheduler" / "scheduler_config.json"
    assert json.loads(scheduler.read_text("utf-8"))["rescale_betas_zero_snr"] is True
