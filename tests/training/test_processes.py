"""Two processes train what one does at the same effective batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from dora_diffusion.formats.adapter.file import read_adapter

SAMPLES = Path(__file__).parents[2] / "samples"

_RUN = """
import sys
import yaml
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.loop import train
train(TrainConfig.from_dict(yaml.safe_load(open(sys.argv[1]))))
"""


def launch(config: dict, tmp_path: Path, processes: int) -> Path:
    script, settings = tmp_path / "run.py", tmp_path / f"{processes}.yaml"
    script.write_text(_RUN)
    output = tmp_path / f"out-{processes}"
    settings.write_text(yaml.safe_dump(config | {"output_dir": str(output)}))
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
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_two_processes_agree_with_one(sd1_folder, tmp_path):
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
        "num_class_images": 3,
        "validation_inference_steps": 2,
        "num_validation_images": 1,
        "checkpointing_steps": 2,
        "random_flip": True,
        "gradient_accumulation_steps": 2,
    }
    one = launch(config | {"train_batch_size": 4}, tmp_path, 1)
    two = launch(config | {"train_batch_size": 2}, tmp_path, 2)
    first, second = read_adapter(one).layers, read_adapter(two).layers
    assert set(first) == set(second)
    for name, layer in first.items():
        for part in ("down", "up", "magnitude"):
            torch.testing.assert_close(
                getattr(layer, part), getattr(second[name], part), rtol=2e-3, atol=2e-5
            )
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 3
