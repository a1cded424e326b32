"""Resuming: refused on other images and settings; what may change is recorded with its step."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dora_diffusion.config import ConfigError, TrainConfig, read_config_file
from dora_diffusion.console.training import TrainProgress
from dora_diffusion.training.continuity import changed_segments, check_same_run
from dora_diffusion.training.loop import train

SAMPLES = Path(__file__).parents[2] / "samples"
PROMPT = "a photo of a sks mug"


@pytest.fixture(scope="module")
def first(sd1_folder, tmp_path_factory):
    """A run of two steps with a checkpoint, its photos (one of them with a mask), its config."""
    root = tmp_path_factory.mktemp("continuity")
    photos = Path(shutil.copytree(SAMPLES / "bolt_mug", root / "photos"))
    for caption in photos.glob("*.txt"):
        caption.unlink()
    for photo in photos.glob("*.jpg"):
        size = Image.open(photo).size
        Image.new("L", size, 255).save(photo.with_name(f"{photo.stem}.mask.png"))
    config = TrainConfig(
        pretrained_model_name_or_path=str(sd1_folder),
        instance_data_dir=str(photos),
        instance_prompt=PROMPT,
        output_dir=str(root / "run"),
        resolution=32,
        rank=2,
        conv_rank=2,
        max_train_steps=2,
        num_validation_images=0,
        checkpointing_steps=2,
        masked_loss=True,
    )
    train(config)
    return config


@pytest.fixture
def again(first, tmp_path):
    """The config of a run that resumes, on a copy of its folder and its photos."""
    shutil.copytree(first.output_dir, tmp_path / "run")
    shutil.copytree(first.instance_data_dir, tmp_path / "photos")
    return replace(
        first,
        output_dir=str(tmp_path / "run"),
        instance_data_dir=str(tmp_path / "photos"),
        max_train_steps=3,
        resume_from_checkpoint="latest",
    )


def another_image(photos):
    image = Image.open(photos / "01.jpg")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "01.jpg")


def another_caption(photos):
    (photos / "01.txt").write_text("a sks mug on the moon", encoding="utf-8")


def another_mask(photos):
    mask = Image.open(photos / "03.mask.png")
    mask.paste(0, (0, 0, 5, 5))
    mask.save(photos / "03.mask.png")


def one_image_less(photos):
    (photos / "02.jpg").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_image, r"1 image missing \(01\.jpg\); 1 image new \(01\.jpg\)"),
        (another_caption, r"another caption of 01\.jpg \('a photo of a sks mug' -> 'a sks mug on"),
        (another_mask, r"other masks \(03\.jpg\)"),
        (one_image_less, r"1 image missing \(02\.jpg\)"),
    ],
)
def test_other_images_captions_and_masks_are_refused(spoil, message, again):
    spoil(Path(again.instance_data_dir))
    with pytest.raises(ConfigError, match=f"cannot resume checkpoint-2: .*other images: {message}"):
        train(again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caption_dropout", 0.5),
        ("snr_gamma", 0.0),
        ("noise_offset", 0.1),
        ("lora_dropout", 0.1),
        ("lr_scheduler", "linear"),
        ("instance_prompt", "a photo of a sks cup"),
        ("lora_alpha", 1.0),
    ],
)
def test_other_settings_that_change_the_training_are_refused(name, value, again):
    with pytest.raises(ConfigError, match=rf"these settings differ: .*{name} \("):
        train(replace(again, **{name: value}))


def test_photos_that_were_moved_and_renamed_resume_with_a_warning(again):
    photos = Path(again.instance_data_dir)
    (photos / "01.jpg").rename(photos / "zz.jpg")
    (photos / "01.mask.png").rename(photos / "zz.mask.png")
    with pytest.warns(UserWarning, match="come in another order"):
        assert not train(again).interrupted


def test_what_may_change_is_said_and_recorded_with_its_step(again, capsys):
    progress = TrainProgress()
    train(replace(again, learning_rate=4e-5, overwrite_output_dir=True), progress)
    progress.close()
    said = capsys.readouterr().out
    changes = "max_train_steps (2 -> 3), learning_rate (8e-05 -> 4e-05)"
    assert f"changed from step 3 on: {changes}" in said
    file = Path(again.output_dir) / "config.yaml"
    record = yaml.safe_load(file.read_text(encoding="utf-8"))["segments"]
    assert record == [
        {"from_step": 1, "settings": {"max_train_steps": 2, "learning_rate": 8e-5}},
        {"from_step": 3, "settings": {"max_train_steps": 3, "learning_rate": 4e-5}},
    ]
    assert TrainConfig.from_dict(read_config_file(file)).learning_rate == 4e-5


def test_segments_grow_from_checkpoint_to_checkpoint(again):
    train(replace(again, checkpointing_steps=1))
    changed = {"max_grad_norm": 0.5, "overwrite_output_dir": True}
    train(replace(again, max_train_steps=4, checkpointing_steps=1, **changed))
    state = torch.load(
        Path(again.output_dir) / "checkpoint-4" / "training_state.pt", weights_only=True
    )
    assert [segment["from_step"] for segment in state["segments"]] == [1, 3, 4]
    apart = changed_segments(state["segments"])
    assert [segment["settings"]["max_grad_norm"] for segment in apart] == [1.0, 1.0, 0.5]
    assert [segment["settings"]["max_train_steps"] for segment in apart] == [2, 3, 4]


def test_a_run_of_one_piece_records_no_segments(first):
    text = (Path(first.output_dir) / "config.yaml").read_text(encoding="utf-8")
    assert "segments" not in text
    assert "max_train_steps: 2\n" in text


def test_the_saved_settings_resume_their_own_run(again):
    """config.yaml is what was used, and stays valid input."""
    saved = read_config_file(Path(again.output_dir) / "config.yaml")
    assert (saved["lora_alpha"], saved["class_word"], saved["resolution"]) == (2.0, "mug", 32)
    own = {
        "output_dir": again.output_dir,
        "instance_data_dir": again.instance_data_dir,
        "resume_from_checkpoint": "latest",
        "max_train_steps": 3,
    }
    assert train(TrainConfig.from_dict(saved | own)).steps == 3


def test_class_images_are_compared_by_content():
    row = {"name": "class-00000.png", "image": "a", "caption": "a mug", "mask": ""}
    before = {"images": [], "class_images": [row]}
    now = {"images": [], "class_images": [row | {"image": "b"}]}
    state = {"config": TrainConfig().to_dict(), "contents": before}
    check_same_run("checkpoint-2", state, TrainConfig(), before)
    with pytest.raises(ConfigError) as error:
        check_same_run("checkpoint-2", state, TrainConfig(), now)
    assert "1 class image missing (class-00000.png); 1 class image new" in str(error.value)
    assert "they follow validation_inference_steps" in str(error.value)
    captioned = {"images": [], "class_images": [row | {"caption": "a cup"}]}
    with pytest.raises(ConfigError, match=r"another caption of class-00000\.png \('a mug' -> "):
        check_same_run("checkpoint-2", state, TrainConfig(), captioned)


def test_settings_for_which_no_step_is_left_are_said_and_not_recorded(again, capsys):
    """A finished run that is asked for again trains nothing at the new rate, and says so."""
    progress = TrainProgress()
    train(replace(again, max_train_steps=2, learning_rate=4e-5, num_validation_images=0), progress)
    progress.close()
    said = capsys.readouterr().out
    assert "at step 2 of 2; nothing is left to train" in said
    assert "without effect, since no step is left: learning_rate (8e-05 -> 4e-05)\n" in said
    assert "changed from" not in said
    saved = yaml.safe_load((Path(again.output_dir) / "config.yaml").read_text(encoding="utf-8"))
    assert saved["learning_rate"] == 8e-5
    assert "segments" not in saved


def test_a_checkpoint_that_is_not_there_is_refused_before_the_model_is_loaded(again):
    missing = replace(
        again, resume_from_checkpoint="checkpoint-9", pretrained_model_name_or_path="no-such/model"
    )
    message = "the checkpoint checkpoint-9 does not exist; the newest in .* is checkpoint-2"
    with pytest.raises(ConfigError, match=message):
        train(missing)


def test_the_saved_settings_of_a_resumed_run_start_another_one(again, tmp_path):
    """Neither --resume_from_checkpoint nor --overwrite_output_dir is a property of the run."""
    train(replace(again, overwrite_output_dir=True))
    saved = read_config_file(Path(again.output_dir) / "config.yaml")
    assert saved["resume_from_checkpoint"] is None
    assert saved["overwrite_output_dir"] is False
    fresh = TrainConfig.from_dict(saved | {"output_dir": str(tmp_path / "fresh")})
    assert train(fresh).steps == 3
