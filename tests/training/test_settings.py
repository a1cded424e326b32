"""Settings that did nothing, or the wrong thing, without a word."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dora_diffusion import cli
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.data.images import PhotoError
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.training.loop import train
from dora_diffusion.training.optimizer import build_optimizer, parameter_groups
from dora_diffusion.training.session import make_accelerator, open_session
from dora_diffusion.training.subject import subject_of

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def photos(tmp_path):
    return Path(shutil.copytree(SAMPLES / "bolt_mug", tmp_path / "photos"))


@pytest.fixture
def config(sd1_folder, photos, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(sd1_folder),
        instance_data_dir=str(photos),
        instance_prompt="a photo of a sks mug",
        output_dir=str(tmp_path / "out"),
        resolution=32,
        rank=2,
        conv_rank=2,
        targets=["attention+conv"],
        max_train_steps=2,
        num_validation_images=0,
        checkpointing_steps=0,
    )


def said_by(config):
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(config)
    return [str(w.message) for w in said if issubclass(w.category, UserWarning)]


def rates(config):
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lr"]["unet/down"] for line in lines]


def test_masked_loss_without_masks_is_refused(config):
    with pytest.raises(PhotoError, match=r"masked_loss is on, but none .*01\.mask\.png beside it"):
        train(replace(config, masked_loss=True))
    assert not list(Path(config.output_dir).glob("*.safetensors"))


def test_masks_that_are_not_read_are_said(config, photos):
    (photos / "01.mask.png").write_bytes(b"")
    assert any(
        text
        == "1 mask file (NAME.mask.png) beside the images has no effect because masked_loss is "
        "off"
        for text in said_by(config)
    )


@pytest.mark.parametrize(
    ("changes", "caption", "message"),
    [
        (
            {"token": "", "class_word": "mug"},
            None,
            r"image-free with token '': the image-free prior",
        ),
        ({}, "a mug on a table", r"1 caption of 5 without the token 'sks' \(first: 'a mug on a"),
    ],
)
def test_an_image_free_prior_of_what_is_trained_is_refused(
    changes, caption, message, config, photos
):
    if caption:
        (photos / "01.txt").write_text(caption)
    held = replace(
        config, with_prior_preservation=True, prior_preservation_mode="image-free", **changes
    )
    with pytest.raises(ConfigError, match=f"{message}.*very prediction that is being trained"):
        train(held)


def test_class_images_of_the_captions_themselves_are_refused(config):
    with pytest.raises(ConfigError, match="prior preservation with token '' needs class_prompt"):
        train(replace(config, with_prior_preservation=True, token="", class_word="mug"))


def test_a_warm_up_rises_with_the_constant_schedule(config):
    run = replace(config, max_train_steps=4, lr_warmup_steps=2, learning_rate=1e-3)
    train(run)
    assert rates(run) == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    saved = yaml.safe_load((Path(run.output_dir) / "config.yaml").read_text())
    assert saved["lr_scheduler"] == "constant_with_warmup"


def test_a_warm_up_longer_than_the_run_is_said(config):
    said = said_by(replace(config, lr_warmup_steps=500))
    assert any("lr_warmup_steps is 500, and the run has 2 steps" in text for text in said)


def test_settings_without_effect_are_said_once_each(config):
    said = said_by(replace(config, text_encoder_lr=1e-3, keep_tags=3))
    assert said == [
        "keep_tags has no effect because shuffle_tags is off",
        "text_encoder_lr has no effect because train_text_encoder is off",
    ]


def test_a_conv_rank_without_conv_layers_is_said(config):
    said = said_by(replace(config, targets=["attention"]))
    assert said == ["conv_rank has no effect because targets name no Conv2d layer"]
    said = said_by(replace(config, targets=["attention"], conv_rank=4, conv_alpha=2.0,
                           overwrite_output_dir=True))  # fmt: skip
    assert said == ["conv_alpha has no effect because targets name no Conv2d layer"]


def test_a_prompt_that_watches_drift_is_warned_of_and_sampled(config):
    watch = replace(
        config,
        max_train_steps=1,
        validation_prompt=["a photo of a mug"],
        num_validation_images=1,
        validation_inference_steps=1,
    )
    said = said_by(watch)
    assert any("'a photo of a mug' does not contain the token 'sks': its" in text for text in said)
    assert (Path(config.output_dir) / "samples" / "adapted.png").is_file()


def test_workers_leave_the_latent_cache_on(config):
    plain = replace(config, output_dir=f"{config.output_dir}-plain")
    train(plain)
    said = said_by(replace(config, dataloader_num_workers=2))
    assert said == ["dataloader_num_workers has no effect because cache_latents is on"]
    first, second = (read_adapter(run.output_dir).layers for run in (plain, config))
    assert all(torch.equal(layer.up, second[name].up) for name, layer in first.items())


def test_without_the_cache_workers_load_pixels(config):
    bare = replace(config, cache_latents=False, dataloader_num_workers=1)
    session = open_session(bare, subject_of(bare), make_accelerator(bare))
    batch = session.next_batch()
    assert batch.moments is None
    assert batch.pixels.shape == (1, 3, 32, 32)


def test_photos_in_sub_folders_are_counted_and_named(config, photos):
    for name, count in (("10_sks", 2), ("old", 1)):
        (photos / name).mkdir()
        for number in range(count):
            shutil.copy(photos / "01.jpg", photos / name / f"{number}.jpg")
    said = said_by(replace(config, max_train_steps=1))
    assert any("left out 2 photos in 10_sks, 1 photo in old; sub-folders" in text for text in said)
    for photo in photos.glob("*.jpg"):
        photo.unlink()
    with pytest.raises(PhotoError, match="found 2 photos in 10_sks, 1 photo in old"):
        train(replace(config, output_dir=f"{config.output_dir}-2"))


def test_the_saved_settings_are_those_that_were_used(config):
    train(replace(config, resolution=None, max_train_steps=None, num_train_epochs=1))
    saved = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())
    used = {
        "resolution": 64, "class_word": "mug", "lora_alpha": 2.0, "conv_alpha": 2.0,
        "max_train_steps": 5, "num_train_epochs": None, "mixed_precision": "no",
    }  # fmt: skip
    assert {name: saved[name] for name in used} == used


def test_samples_every_epoch_are_samples_every_so_many_steps(config):
    train(
        replace(
            config, max_train_steps=6, validation_epochs=1, num_validation_images=1,
            validation_inference_steps=1, train_batch_size=2,
        )
    )  # fmt: skip
    names = sorted(p.name for p in (Path(config.output_dir) / "samples").glob("step-*.png"))
    assert names == ["step-000003.png"]  # 5 photos in batches of 2


def test_text_encoders_have_their_own_weight_decay(sd1_folder):
    from dora_diffusion.adapters.inject import inject_adapters

    components = load_components(str(sd1_folder))
    config = TrainConfig(adam_weight_decay=0.1, adam_weight_decay_text_encoder=0.3, rank=2)
    inject_adapters(components.unet, config.unet_adapter)
    inject_adapters(components.text_encoders[0], config.text_encoder_adapter)
    groups = {
        g["name"]: g["weight_decay"] for g in parameter_groups(components.adaptable(), config)
    }
    assert (groups["unet/down"], groups["text_encoder/down"]) == (0.1, 0.3)
    assert (groups["unet/magnitude"], groups["text_encoder/magnitude"]) == (0.0, 0.0)


def test_prodigy_gets_its_settings():
    pytest.importorskip("prodigyopt")
    config = TrainConfig(
        optimizer="prodigy", learning_rate=1.0, prodigy_beta3=0.7, prodigy_decouple=False,
        prodigy_use_bias_correction=True, prodigy_safeguard_warmup=False,
    )  # fmt: skip
    group = {"name": "x", "params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0}
    chosen = build_optimizer([group], config).param_groups[0]
    names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    assert [chosen[name] for name in names] == [0.7, False, True, False]


class TestCommand:
    """What the command says at the start."""

    FLAGS = (
        "--instance_prompt", "a photo of a sks mug", "--max_train_steps", "1",
        "--num_validation_images", "0", "--checkpointing_steps", "0", "--rank", "2",
    )  # fmt: skip

    def test_the_model_and_the_device_are_one_line(self, config, capsys):
        flags = [*self.FLAGS, "--instance_data_dir", config.instance_data_dir]
        flags += ["--output_dir", config.output_dir]
        model = config.pretrained_model_name_or_path
        code = cli.main(["train", *flags, "--pretrained_model_name_or_path", model])
        captured = capsys.readouterr()
        assert code == 0
        assert captured.out.splitlines()[0] == f"training {model} on cpu in float32"
        assert "NO BASE MODEL" not in captured.err

    def test_the_toy_model_is_not_taken_silently(self, photos, tmp_path, capsys):
        output = ["--instance_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
        assert cli.main(["train", *self.FLAGS, *output]) == 0
        captured = capsys.readouterr()
        assert "warning: NO BASE MODEL WAS GIVEN: embedded:tiny-sd is trained" in captured.err
        assert "training embedded:tiny-sd on cpu" in captured.out

    def test_a_run_without_a_token_names_no_empty_trigger_word(self, config, capsys):
        flags = [*self.FLAGS, "--instance_data_dir", config.instance_data_dir, "--token", ""]
        flags += ["--output_dir", config.output_dir, "--pretrained_model_name_or_path"]
        assert cli.main(["train", *flags, config.pretrained_model_name_or_path]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("it has no trigger word: write prompts like its captions")
        assert last.endswith("such as 'a photo of a sks mug'")

    def test_a_flag_without_effect_is_said_at_its_default_too(self, photos, tmp_path, capsys):
        more = ["--instance_data_dir", str(photos), "--output_dir", str(tmp_path / "out")]
        more += ["--keep_tags", "1", "--pretrained_model_name_or_path", "embedded:tiny-sd"]
        assert cli.main(["train", *self.FLAGS, *more]) == 0
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
        assert lines == ["warning: keep_tags has no effect because shuffle_tags is off"]

    def test_a_finished_run_is_published_privately_when_asked(self, config, monkeypatch, capsys):
        calls = []
        monkeypatch.setattr("dora_diffusion.hub.check", lambda name: calls.append(("check", name)))

        def push(folder, name, *, private):
            assert list(Path(folder).glob("*.safetensors"))
            calls.append(("push", name, private))
            return "https://hub/me/mug"

        monkeypatch.setattr("dora_diffusion.hub.push", push)
        flags = [*self.FLAGS, "--instance_data_dir", config.instance_data_dir]
        flags += ["--output_dir", config.output_dir]
        flags += ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path]
        assert cli.main(["train", *flags, "--push_to_hub", "--hub_model_id", "me/mug"]) == 0
        assert calls == [("check", "me/mug"), ("push", "me/mug", True)]
        assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mug"
