"""Subjects with an adapter each: one training's settings for every one of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.subject_list import subject_configs
from tests.every import every
from tests.refusal import check, refused

SHARED_SETTINGS = TrainConfig(output_dir="out", rank=4, class_word="dog", seed=3)


def test_an_entry_is_the_shared_settings_with_its_own_over_them() -> None:
    own: dict[str, Any] = {
        "instance_data_dir": "photos/rex", "rank": 8, "learning_rate": "2e-4", "seed": 7,
        "max_train_steps": 5, "max_grad_norm": 0.5, "validation_prompt": ["a sks dog"],
    }  # fmt: skip
    made = subject_configs([own, {"name": "b", "instance_data_dir": "photos/b"}], SHARED_SETTINGS)
    assert list(made) == ["rex", "b"]
    changes = {"learning_rate": 2e-4, "output_dir": str(Path("out", "rex"))}
    changes["instance_prompt"] = "a photo of a sks dog"
    expected = dataclasses.replace(SHARED_SETTINGS, **{**own, **changes})
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
        ([{"instance_data_dir": "a/x"}, {"name": "X"}], "the name 'X' is also the name of"),
        ([{"name": "a", "quantize": "int8"}], "all subjects share quantize"),
        ([{"name": "a", "mixed_precision": "bf16"}], "all subjects share mixed_precision"),
        ([{"name": "a", "rnak": 2}], "there is no setting rnak (did you mean rank"),
        ([{"name": "../a"}], "the name '../a' is not valid for a folder"),
        ([{"name": "a\nb"}], "the name 'a b' is not valid for a folder"),
        ([{"name": False}], "the name False is not text"),
        ([{"name": ["a"]}], "the name ['a'] is not text"),
        (["a"], "'a' is not a subject"),
        ([None], "'None' is not a subject"),
        ([{"rank": 2}], "it has neither a name nor a single folder"),
        ([{"name": "a", "rank": 0}], "rank is 0"),
    ],
)
def test_what_an_entry_cannot_be(entries: list[dict[str, Any]], said: str) -> None:
    """It alone is refused, wherever it is; where there is no other, that is an error."""
    if len(entries) < 2:
        with refused("dataset_config", f"entry 1: {said}"):
            subject_configs(entries, SHARED_SETTINGS)
    made = subject_configs([{"name": "good"}, *entries, {"name": "other"}], SHARED_SETTINGS)
    assert isinstance(made["good"], TrainConfig)
    assert isinstance(made["other"], TrainConfig)
    (error,) = (value for value in made.values() if isinstance(value, ConfigError))
    check(error, "dataset_config", f"subjects, entry {len(entries) + 1}: {said}")
    assert ("name of subjects, entry 2" in str(error)) == (len(entries) > 1)
    assert list(made)[-1] == "other"


ODD = [None, "", "x", -1, 0, 0.5, True, math.nan, math.inf, 10**30, [], [None], [[1]], {}, {"a": 1}]


def test_no_value_of_any_setting_is_more_than_its_subject_s_error() -> None:
    good = dataclasses.replace(SHARED_SETTINGS, output_dir=str(Path("out", "good")))
    cases = [(setting.name, value) for setting in settings() for value in ODD]
    odd = [
        {"name": f"odd {number}", "instance_data_dir": "photos", name: value}
        for number, (name, value) in enumerate(cases)
    ]
    made = subject_configs([{"name": "good"}, *odd], SHARED_SETTINGS)
    assert made["good"] == good
    with every() as case:
        for number, (name, value) in enumerate(cases):
            with case(f"{name} = {value!r}"):
                assert isinstance(made[f"odd {number}"], TrainConfig | ConfigError)
    assert 500 < sum(isinstance(value, ConfigError) for value in made.values()) < len(cases)


def test_a_file_that_is_wrong_is_its_folder_s_error(tmp_path: Path) -> None:
    """Under the name of the folder, which it keeps where another one's file gives it too."""
    files = {
        "bolt": "name: mug", "broken": "rank: [", "double": "name: tea", "empty": 'name: ""',
        "latin": b"class_word: \xe9", "listed": "- rank", "mug": "", "negative": "rank: -1",
        "other": "instance_data_dir: x", "tea": "rank: 2", "twice": "rank: 2\nrank: 3",
        "wordless": "class_word: ''",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).mkdir()
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name / "subject.yaml").write_bytes(data)
    shared = dataclasses.replace(SHARED_SETTINGS, class_word=None)
    made = subject_configs(tmp_path, dataclasses.replace(shared, instance_prompt="a sks mug"))
    assert list(made) == sorted(files)
    errors = {name: str(value) for name, value in made.items() if isinstance(value, ConfigError)}
    assert set(files) - set(errors) == {"mug", "tea", "wordless"}
    assert all(str(tmp_path / name / "subject.yaml") in text for name, text in errors.items())
    assert f"'mug' is also the name of {tmp_path / 'mug'}" in errors["bolt"]


@pytest.mark.parametrize(
    ("own", "prompt"),
    [({"class_word": "cat"}, "a photo of a sks cat"), ({}, "a photo of a sks dog"),
     ({"class_word": "cat", "token": "zwx"}, "a photo of a zwx cat"),
     ({"class_word": "cat", "instance_prompt": "my sks cat"}, "my sks cat"),
     ({"class_word": "cat", "token": ""}, None)],
)  # fmt: skip
def test_an_entry_without_a_prompt_has_that_of_its_class_word_as_a_folder_has(
    own: dict[str, Any], prompt: str | None
) -> None:
    (made,) = subject_configs([{"instance_data_dir": "photos/a", **own}], SHARED_SETTINGS).values()
    assert made.instance_prompt == prompt


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
    alone = subject_configs(tmp_path, TrainConfig())
    assert "rex: there is no class word; give --class_word" in str(alone["rex"])
    assert alone["tom"].class_word == "cat"
    (tmp_path / "tom" / "subject.yaml").unlink()
    with refused("dataset_config", "rex: there is no class word", "(and 1 other subject)"):
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
    for source, words in ((tmp_path / "none", "does not exist"), ([], "holds no subject")):
        with refused("subjects", words):
            subject_configs(source, TrainConfig())
