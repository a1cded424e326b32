"""Users' errors: photos, names, memory and signals, as the command line tells them.

Each failure is exit code and one line; each warning is a line, and the run continues.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.step import Step

SAMPLES = Path(__file__).parents[2] / "samples"
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in sorted((SAMPLES / "ring_robot").glob("*.jpg"))[:3]:
        shutil.copy(photo, folder)
    return folder


@pytest.fixture
def flags(sd1_folder: Path, photos: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a one-step run, with changes."""

    def make(**changes: object) -> list[str]:
        settings = {
            "pretrained_model_name_or_path": sd1_folder,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of a sks robot",
            "output_dir": tmp_path / "output",
            "resolution": 32,
            "rank": 2,
            "conv_rank": 2,
            "targets": "cross-attention",
            "max_train_steps": 1,
            "num_validation_images": 0,
            "checkpointing_steps": 0,
            **changes,
        }
        given = [(f"--{k}", str(v)) for k, v in settings.items() if v is not None]
        return ["train", *(part for pair in given for part in pair)]

    return make


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def add_bad_photos(folder: Path) -> dict[str, str]:
    """Write one photo of each bad kind. Returns file name -> what must be said of it."""
    good = next(folder.glob("*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("not an image", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    (folder / "locked.webp").write_bytes(good)  # a JPEG by its bytes: fine, whatever its name
    # 100 megapixels in a few kilobytes: what must not be decoded to be refused.
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    assert (folder / "huge.png").stat().st_size < 100_000
    return {
        "cut.jpg": "cut short",
        "text.jpg": "not a JPEG, PNG, WebP or HEIC image",
        "empty.png": "the file is empty",
        "huge.png": "100.0 megapixels, above the limit of 89.5; scale its",
    }


def test_bad_photos_among_good_ones_are_named_and_left_out(flags, photos, tmp_path, capfd):
    reasons = add_bad_photos(photos)
    assert main(flags()) == 0
    out, err = capfd.readouterr()
    warnings = lines(err, "warning: photo skipped: ")
    assert len(warnings) == len(reasons)
    for name, reason in reasons.items():
        (line,) = (line for line in warnings if name in line)
        assert reason in line
    assert "4 photos" in out, "three good ones and the JPEG that is called .webp"
    assert read_adapter(tmp_path / "output").layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "text-encoder"}, "the preset 'text-encoder' matches no layer"),
        ({"conv_rank": 64, "targets": "full"}, "use conv_rank <= 32"),
        ({"instance_prompt": None}, "instance_prompt is not set"),
        ({"resume_from_checkpoint": "nowhere"}, "the checkpoint nowhere does not exist"),
        ({"pretrained_model_name_or_path": "no-such/model"}, "no-such/model is not a local folder"),
        ({"pretrained_model_name_or_path": "{photos}"}, "it has no model_index.json"),
        ({"output_dir": "{photos}/01.jpg"}, "01.jpg"),
    ],
)
def test_settings_that_cannot_work_are_one_line(changes, message, flags, photos, capfd):
    changes = {k: v.format(photos=photos) if isinstance(v, str) else v for k, v in changes.items()}
    before = {path: path.read_bytes() for path in photos.iterdir()}
    assert main(flags(**changes)) == 1
    captured = capfd.readouterr()
    (line,) = lines(captured.err, "error: ")
    assert message in line
    assert "Traceback" not in captured.err
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_running_out_of_memory_keeps_the_checkpoints(flags, tmp_path, capfd, monkeypatch):
    real = Step.begin

    def fail_at_three(self, step):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "begin", fail_at_three)
        assert main(flags(max_train_steps=4, checkpointing_steps=2)) == 3
    (line,) = lines(capfd.readouterr().err, "error: ")
    assert line.startswith("error: out of memory; ")
    assert "--gradient_checkpointing" in line
    assert [path.name for path in checkpoints_in(tmp_path / "output")] == ["checkpoint-2"]
    assert not (tmp_path / "output" / ADAPTER).exists(), "an unfinished run has no result"
    more = flags(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert main(more) == 0
    assert "resuming from checkpoint-2, at step 2 of 4" in capfd.readouterr().out
    assert (tmp_path / "output" / ADAPTER).is_file()


def test_a_terminated_run_saves_and_goes_on(flags, tmp_path, capfd, monkeypatch):
    """`tests/training/test_signals.py` ends another process, by closing its terminal."""
    output, real, step = tmp_path / "output", Step.begin, 3

    def terminated(self, number):
        real(self, number)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "begin", terminated)
        assert main(flags(max_train_steps=100_000)) == 128 + signal.SIGTERM
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "stopping after this step, and saving a checkpoint" in text
    assert "checkpoint saved; resume with --resume_from_checkpoint latest" in text
    (checkpoint,) = checkpoints_in(output)
    assert checkpoint.name == f"checkpoint-{step}"
    assert f"stopped at step {step} of 100000" in text
    assert not (output / ADAPTER).exists()
    assert read_adapter(checkpoint).metadata.extra["training_steps"] == str(step)
    assert main(flags(max_train_steps=step + 1)) == 1, "it must not start over by accident"
    (line,) = lines(capfd.readouterr().err, "error: ")
    assert "--resume_from_checkpoint latest" in line
    assert main(flags(max_train_steps=step + 1, resume_from_checkpoint="latest")) == 0
    log = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, step + 2))
    result = read_adapter(output)
    assert result.metadata.extra["training_steps"] == str(step + 1)
    before = read_adapter(checkpoint).layers
    moved = [not torch.equal(one.up, before[name].up) for name, one in result.layers.items()]
    assert any(moved)
