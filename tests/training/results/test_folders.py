"""The output folder: one run at a time, and none of the user's own folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.folders import check_folders, output_folder
from tests.refusal import refused
from tests.training.helpers import make_config
from tests.waiting import STAY

_HOLD = """
import sys
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.results.folders import output_folder
with output_folder(TrainConfig(output_dir=sys.argv[1])):
    exec(sys.argv[2])
"""


@pytest.fixture
def other_run(tmp_path: Path):
    """Another process that holds the folder ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "out"), STAY],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(
    other_run, tiny_run, tmp_path
):
    config = tiny_run(max_train_steps=1)
    for changes in ({}, {"overwrite_output_dir": True}):
        with refused("output_dir", "another run is writing") as error:
            train(replace(config, **changes))
        assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.lock"]
    other_run.kill()  # without a chance to clean up
    other_run.wait()
    assert train(config).adapter.is_file()


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    import filelock

    def refuse(*args, **kwargs):
        raise NotImplementedError("flock is not supported")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with (
        pytest.warns(UserWarning, match="does not support locks") as caught,
        output_folder(TrainConfig(output_dir=str(tmp_path / "out"))),
    ):
        pass
    (warning,) = (each for each in caught if each.category is UserWarning)
    assert Path(warning.filename).name == "folders.py", "the command line shows ours only"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("photos", "and instance_data_dir are the same"),
        ("photos/../photos/", "and instance_data_dir are the same"),
        ("photos/run", "is inside instance_data_dir"),
        ("link", "and instance_data_dir are the same"),
        ("model", "and pretrained_model_name_or_path are the same"),
        ("model/unet/run", "is inside pretrained_model_name_or_path"),
    ],
)
def test_a_run_does_not_write_among_photos_or_a_models_files(
    output, message, tiny_run, sd1_folder, photos, tmp_path
):
    shutil.copytree(sd1_folder, tmp_path / "model")
    (tmp_path / "link").symlink_to(photos)
    (photos / "README.md").write_text("mine", encoding="utf-8")
    config = tiny_run(
        output_dir=os.path.join(tmp_path, output),
        pretrained_model_name_or_path=str(tmp_path / "model"),
        overwrite_output_dir=True,
    )
    before = contents(tmp_path)
    with refused("output_dir", message):
        train(config)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["samples", "logs", "class_images", "checkpoint-4"])
def test_photos_are_not_read_from_a_folder_that_the_run_writes_to(place, tiny_run, tmp_path):
    (tmp_path / "out" / place).mkdir(parents=True)
    config = tiny_run(instance_data_dir=str(tmp_path / "out" / place))
    with refused("instance_data_dir", "the run's", "are the same folder"):
        check_folders(config)
    held_out = tiny_run(validation_data_dir=str(tmp_path / "out" / place))
    with refused("validation_data_dir", "the run's", "are the same folder"):
        check_folders(held_out)


def test_photos_in_a_folder_of_their_own_inside_are_fine(tiny_run, photos, tmp_path):
    """As the app has them, so that a run keeps what it was trained on."""
    inside = Path(shutil.copytree(photos, tmp_path / "out" / "photos"))
    before = contents(inside)
    train(tiny_run(instance_data_dir=str(inside), max_train_steps=1))
    assert contents(inside) == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photos", "the folder of the subject's photos"),
        ("out", "the run writes its own files"),
        ("out/samples", "the run writes its own files"),
    ],
)
def test_class_images_have_a_folder_of_their_own(place, message, tiny_run, tmp_path):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    config = tiny_run(class_data_dir=str(tmp_path / place), with_prior_preservation=True)
    with refused("class_data_dir", message):
        check_folders(config)
    check_folders(replace(config, with_prior_preservation=False))


@pytest.mark.parametrize("name", ["README.md", "config.yaml"])
def test_files_that_no_run_wrote_are_not_replaced_unasked(name, tiny_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    with refused("output_dir", f"contains {name}, which no run has written"):
        train(tiny_run(max_train_steps=1))
    assert (tmp_path / "out" / name).read_text(encoding="utf-8") == "mine"
    (tmp_path / "out" / "metrics.jsonl").write_text(
        "", encoding="utf-8"
    )  # a run's own, that saved nothing
    train(tiny_run(max_train_steps=1))


def test_an_overwritten_result_leaves_nothing_behind(sd1_folder, photos, tmp_path):
    out = tmp_path / "out"
    config = make_config(sd1_folder, photos, out, max_train_steps=1, validation_steps=1)
    train(replace(config, max_train_steps=2, num_validation_images=1))
    (out / "samples" / "mine.png").write_bytes(b"kept")
    assert (out / "samples" / "step-000001.png").is_file()
    train(replace(config, overwrite_output_dir=True, norm_axis="input"))
    assert [path.name for path in out.glob("*.safetensors")] == ["dora_kohya.safetensors"]
    assert {layer.norm_axis for layer in read_adapter(out).layers.values()} == {"input"}
    assert [path.name for path in (out / "samples").iterdir()] == ["mine.png"]


def test_a_folder_that_is_not_a_result_keeps_its_files(sd1_folder, photos, tmp_path):
    from dora_diffusion.training.results.folders import clear_folder

    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    clear_folder(tmp_path, 0)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
