"""Subjects with an adapter each: one training's settings for every one of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.subject_list import SHARED, subject_configs

SHARED_SETTINGS = TrainConfig(output_dir="out", rank=4, class_word="dog", seed=3)


def test_an_entry_is_the_shared_settings_with_its_own_over_them() -> None:
    own: dict[str, Any] = {
        "instance_data_dir": "photos/rex", "rank": 8, "learning_rate": "2e-4", "seed": 7,
        "max_train_steps": 5, "max_grad_norm": 0.5, "validation_prompt": ["a sks dog"],
    }  # fmt: skip
    made = subject_configs([own, {"name": "b", "instance_data_dir": "photos/b"}], SHARED_SETTINGS)
    assert list(made) == ["rex", "b"]
    expected = dataclasses.replace(
        SHARED_SETTINGS, **{**own, "learning_rate": 2e-4, "output_dir": str(Path("out", "rex"))}
    )
    assert made["rex"] == expected
    assert (made["b"].rank, made["b"].output_dir) == (4, str(Path("out", "b")))


def test_a_subject_with_two_folders_has_one_adapter() -> None:
    entry = {"name": "rex", "instance_data_dir": ["a", "b"], "token": "rex"}
    (config,) = subject_configs([entry], SHARED_SETTINGS).values()
    assert [s.instance_data_dir for s in config.subjects] == ["a", "b"]
    assert [s.token for s in config.subjects] == ["rex", "rex"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"instance_data_dir": "a/x"}, {"name": "X"}], "entry 2.*'X' is that of entry 1"),
        ([{"name": "a", "mixed_precision": "bf16"}], "entry 1: mixed_precision: this all subjects"),
        ([{"name": "a", "rnak": 2}], "entry 1: there is no setting rnak.*rank"),
        ([{"name": "../a"}], "cannot be that of a folder"),
        ([{"rank": 2}], "it has no name"),
        ([{"name": "a", "rank": 0}], "entry 1: rank is 0"),
        ([], "holds no subject"),
    ],
)
def test_what_an_entry_cannot_be(entries: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        subject_configs(entries, SHARED_SETTINGS)


def test_what_a_loaded_base_is_made_of_is_shared() -> None:
    assert {"pretrained_model_name_or_path", "mixed_precision", "offload", "compile"} <= SHARED
    assert not {"seed", "rank", "resolution", "learning_rate", "max_train_steps"} & SHARED


def test_folders_are_subjects_called_as_they_are(tmp_path: Path) -> None:
    for name in ("rex", "tom", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "tom" / "subject.yaml").write_text("class_word: cat\nrank: 2\n", "utf-8")
    made = subject_configs(tmp_path, SHARED_SETTINGS)
    assert {name: (c.instance_prompt, c.class_word, c.rank) for name, c in made.items()} == {
        "rex": ("a photo of a sks dog", "dog", 4),
        "tom": ("a photo of a sks cat", "cat", 2),
    }
    assert made["tom"].instance_data_dir == str(tmp_path / "tom")
    with pytest.raises(ConfigError, match=r"rex has no class word; give --class_word"):
        subject_configs(tmp_path, TrainConfig())


def test_kohyas_folders_and_a_yaml_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "k" / "10_zwx cat").mkdir(parents=True)
    (config,) = subject_configs(tmp_path / "k", TrainConfig()).values()
    assert (config.token, config.class_word, config.repeats) == ("zwx", "cat", 10)
    file = tmp_path / "subjects.yaml"
    file.write_text("- name: a\n  rank: 2\n- name: b\n", "utf-8")
    assert {n: c.rank for n, c in subject_configs(file, SHARED_SETTINGS).items()} == {
        "a": 2,
        "b": 4,
    }
    with pytest.raises(ConfigError, match="does not exist"):
        subject_configs(tmp_path / "none", TrainConfig())
