"""What Accelerate sets up: precision, patience, and processes that agree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.accelerator import make_accelerator, set_by_any
from dora_diffusion.training.loop import train
from tests.training.helpers import SAMPLES, losses, make_config

_RUN = """
import sys
import yaml
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.loop import train
train(TrainConfig.from_dict(yaml.safe_load(open(sys.argv[1]))))
"""


def launch(config: dict, tmp_path: Path, processes: int) -> Path:
    script, settings = tmp_path / "run.py", tmp_path / f"{processes}.yaml"
    script.write_text(_RUN, encoding="utf-8")
    output = tmp_path / f"out-{processes}"
    settings.write_text(yaml.safe_dump(config | {"output_dir": str(output)}), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    # With ACCELERATE_USE_CPU, the launcher for several GPUs starts CPU processes.
    several = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    command += several if processes > 1 else ["--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*command, str(script), str(settings)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="dora"),
        pytest.param({"init": "pissa"}, id="pissa", marks=pytest.mark.slow),
        pytest.param(
            {"direction": "adalora", "rank": 4, "allocation_interval": 1},
            id="adalora", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_two_processes_agree_with_one(sd1_folder, tmp_path, variant):
    photos = shutil.copytree(SAMPLES / "heart_teapot", tmp_path / "photos")
    config = {
        "pretrained_model_name_or_path": str(sd1_folder),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks teapot",
        "resolution": 32,
        "rank": 2,
        "conv_rank": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "train_text_encoder": True,
        "text_encoder_lr": 1e-3,
        "with_prior_preservation": True,
        "prior_preservation_mode": "images",
        "num_class_images": 3,
        "validation_inference_steps": 2,
        "num_validation_images": 1,
        "checkpointing_steps": 2,
        "random_flip": True,
        "gradient_accumulation_steps": 2,
        **variant,
    }
    one = launch(config | {"train_batch_size": 4}, tmp_path, 1)
    two = launch(config | {"train_batch_size": 2}, tmp_path, 2)
    first, second = read_adapter(one).layers, read_adapter(two).layers
    assert set(first) == set(second)
    for name, layer in first.items():
        for part in ("down", "up", "magnitude"):
            torch.testing.assert_close(
                getattr(layer, part), getattr(second[name], part), rtol=2e-3, atol=5e-5
            )
    assert len((two / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_processes_wait_as_long_as_class_images_take(sd1_folder, photos, tmp_path):
    accelerator = make_accelerator(make_config(sd1_folder, photos, tmp_path / "out"))
    assert accelerator.init_handler.timeout.total_seconds() > 3600


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_float16_with_its_gradient_scaler_stays_near_float32(
    max_grad_norm, sd1_folder, photos, tmp_path, monkeypatch
):
    """What Accelerate sets up on a GPU for fp16, on this CPU: autocast and scaler, half weights."""
    exact = make_config(sd1_folder, photos, tmp_path / "fp32", max_grad_norm=max_grad_norm)
    train(exact)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def on_cpu(config):
        accelerator = make_accelerator(replace(config, mixed_precision="no"))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, scaler
        return accelerator

    monkeypatch.setattr("dora_diffusion.training.loop.make_accelerator", on_cpu)
    train(replace(exact, mixed_precision="fp16", output_dir=str(tmp_path / "fp16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "fp16")[step] == pytest.approx(loss, rel=0.01)
    norms, expected = (losses(tmp_path / name, "grad_norm") for name in ("fp16", "fp32"))
    assert norms[1] == pytest.approx(expected[1], rel=0.05)
    assert scaler.get_scale() > 1, "no step was skipped until nothing was left of the scale"
    halves, wholes = (read_adapter(tmp_path / name).layers for name in ("fp16", "fp32"))
    assert {layer.up.dtype for layer in halves.values()} == {torch.float32}
    moved = torch.cat([layer.up.flatten() for layer in halves.values()])
    expected = torch.cat([layer.up.flatten() for layer in wholes.values()])
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.9


def test_bfloat16_stays_near_float32(sd1_folder, photos, tmp_path):
    exact = make_config(sd1_folder, photos, tmp_path / "fp32")
    train(exact)
    train(replace(exact, mixed_precision="bf16", output_dir=str(tmp_path / "bf16")))
    for step, loss in losses(tmp_path / "fp32").items():
        assert losses(tmp_path / "bf16")[step] == pytest.approx(loss, rel=0.03)
    assert {t.up.dtype for t in read_adapter(tmp_path / "bf16").layers.values()} == {torch.float32}


def test_what_one_process_asks_for_all_of_them_do():
    class OtherAsks:
        num_processes, device = 2, "cpu"

        def reduce(self, flags, reduction):
            assert reduction == "sum"
            return flags + torch.tensor([0.0, 1.0, 1.0])

    assert set_by_any(OtherAsks(), False, False, True) == [False, True, True]
