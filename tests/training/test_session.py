"""A session's settings, as they are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dora_diffusion.training.loop import train
from tests.training.helpers import losses, make_config


def test_the_saved_settings_are_those_that_were_used(config):
    train(replace(config, resolution=None, max_train_steps=None, num_train_epochs=1))
    saved = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text(encoding="utf-8"))
    used = {
        "resolution": 64, "class_word": "mug", "lora_alpha": 2.0, "conv_alpha": 2.0,
        "max_train_steps": 5, "num_train_epochs": None, "mixed_precision": "no",
    }  # fmt: skip
    assert {name: saved[name] for name in used} == used


def test_a_single_file_checkpoint_trains_offline(sd1_folder, photos, tmp_path):
    from dora_diffusion.export import export_checkpoint

    first = make_config(sd1_folder, photos, tmp_path / "first", max_train_steps=1)
    train(first)
    single = tmp_path / "single.safetensors"
    export_checkpoint(str(sd1_folder), tmp_path / "first", single, strength=0.0)
    config = replace(
        first,
        pretrained_model_name_or_path=str(single),
        model_config=str(sd1_folder),
        output_dir=str(tmp_path / "second"),
    )
    train(config)
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), rel=1e-5)
