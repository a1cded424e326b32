"""Folders as people have them: spaces, umlauts, other scripts, and paths of 300 characters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.sampling.images import read_parameters
from dora_diffusion.studio.jobs.queue import JobQueue
from dora_diffusion.studio.jobs.store import Workspace
from dora_diffusion.studio.jobs.subjects import take_sample
from dora_diffusion.studio.jobs.tasks import start_conversion, write_card
from tests.studio.jobs.helpers import add_run, done, perform, wait

SAMPLES = Path(__file__).parents[2] / "samples"
BASE = "embedded:tiny-sd"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "Ünïcode with spaces" / "Käthe's Fotos, 猫 & Ж (1)"
    while len(str(folder)) < 300:
        folder /= "one of many folders"
    folder.mkdir(parents=True)
    return folder


def test_a_subject_goes_all_the_way_in_any_folder(home: Path) -> None:
    """Trained, resumed, merged, verified, converted, and drawn from the merged model."""
    photos = Path(shutil.copytree(SAMPLES / "bolt_mug", home / "Meine Fotos"))
    (photos / "01.jpg").rename(photos / "Über alles (Kopie).jpg")
    (photos / "01.txt").rename(photos / "Über alles (Kopie).txt")
    run, merged = home / "mein Lauf", home / "Größe M.safetensors"
    train = [
        "train", "--pretrained_model_name_or_path", BASE, "--instance_data_dir", str(photos),
        "--instance_prompt", "a photo of a sks mug", "--output_dir", str(run), "--rank", "2",
        "--targets", "cross-attention", "--learning_rate", "1e-2", "--num_validation_images", "1",
        "--validation_inference_steps", "2", "--checkpointing_steps", "1",
        "--lr_warmup_steps", "0",
    ]  # fmt: skip
    assert main([*train, "--max_train_steps", "1"]) == 0
    assert main([*train, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    assert read_adapter(run).metadata.extra["training_steps"] == "2"
    assert (run / "samples" / "adapted.png").is_file()
    model = ["--base", BASE, "--adapter", str(run)]
    for _ in range(2):  # the second one replaces the first
        assert main(["export", *model, "--output", str(merged), "--overwrite"]) == 0
        assert main(["export", *model, "--output", str(home / "Größe S"), "--overwrite"]) == 0
    assert main(["verify", str(merged), *model]) == 0
    assert main(["convert", str(run), str(home / "für A1111.safetensors"), "--to", "kohya"]) == 0
    image = home / "Bild ä.png"
    draw = ["generate", "--base", str(home / "Größe S"), "--prompt", "a sks mug: ü", "--seed", "3"]
    assert main([*draw, "--steps", "2", "--output", str(image)]) == 0
    with Image.open(image) as drawn:
        assert drawn.size == (64, 64)
    assert (read_parameters(image) or "").startswith("a sks mug: ü\n")


def test_the_apps_jobs_work_in_any_folder(home: Path, sd1_folder: Path) -> None:
    workspace = Workspace(home / "Läufe").make()
    subject = workspace.subject(take_sample(workspace, SAMPLES, "bolt_mug"))
    for caption in (subject / "photos").glob("*.txt"):
        caption.unlink()
    queue = JobQueue(workspace)
    model = Path(shutil.copytree(sd1_folder, home / "Bäse"))
    job_id = add_run(
        workspace, model, subject / "photos", token="Käthes", class_word="Täßchen: 1/2?",
        instance_prompt="a photo of a Käthes mug", max_train_steps=1, checkpointing_steps=0,
    )  # fmt: skip
    try:
        job = wait(workspace, queue, job_id, done)
    finally:
        queue.close()
    exported = Path(perform(workspace, start_conversion(workspace, job, "kohya")).record.output)
    assert exported.name == f"{job_id}.safetensors"
    assert all(torch.isfinite(layer.up).all() for layer in read_adapter(exported).layers.values())
    assert "Täßchen" in write_card(workspace, job).read_text(encoding="utf-8")
