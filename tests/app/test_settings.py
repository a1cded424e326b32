"""The page's choices become settings, and settings become a command that makes them again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dora_diffusion.app.settings import (
    ADVANCED,
    EMBEDDED,
    FIELDS,
    PRESET_NAMES,
    as_yaml,
    command_line,
    make_config,
    preset_values,
)
from dora_diffusion.app.workspace import AppError
from dora_diffusion.cli import build_parser
from dora_diffusion.commands.flags import train_config
from dora_diffusion.config import ConfigError, TrainConfig, read_config_file


def config(**changes: object) -> TrainConfig:
    advanced = preset_values("balanced", EMBEDDED) | changes
    return make_config(
        EMBEDDED, Path("my photos"), Path("runs/x"), "sks", "toy robot", ["a {subject} at night"],
        advanced,
    )  # fmt: skip


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("model", [EMBEDDED, "org/model"])
def test_every_preset_is_a_valid_config(preset: str, model: str) -> None:
    values = preset_values(preset, model)
    assert set(values) == set(ADVANCED) <= set(FIELDS)
    made = make_config(model, Path("p"), Path("o"), "sks", "dog", [], values)
    assert made.center_crop  # the crop that the Subject tab shows
    assert made.checkpointing_steps > 0  # Stop and Resume need checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": False, "norm_axis": "input", "learning_rate": 3.2e-5, "rank": 3},
        {"targets": "attention mid_block.*", "class_prompt": 'it\'s $(a) `photo`; "b" \\'},
        {"center_crop": False, "validation_steps": None, "with_prior_preservation": False},
    ],
)
def test_the_command_line_makes_the_same_config(changes: dict[str, object]) -> None:
    one = config(**changes)
    words = shlex.split(command_line(one).replace("\\\n", " "))
    assert words[:5] == ["OMP_NUM_THREADS=1", "python", "-m", "dora_diffusion", "train"]
    assert train_config(build_parser().parse_args(words[4:])) == one


def test_the_settings_file_makes_the_same_config(tmp_path: Path) -> None:
    one = config(rank=5)
    (tmp_path / "settings.yaml").write_text(as_yaml(one), encoding="utf-8")
    assert TrainConfig.from_dict(read_config_file(tmp_path / "settings.yaml")) == one


def test_prompts_name_the_subject() -> None:
    one = config()
    assert one.instance_prompt == "a photo of a sks toy robot"
    assert one.validation_prompt == ["a sks toy robot at night"]


def test_an_empty_field_means_the_default() -> None:
    one = config(learning_rate=None, targets="", class_prompt=" ", resolution=None)
    default = TrainConfig()
    assert one.learning_rate == default.learning_rate
    assert (one.targets, one.class_prompt, one.resolution) == (default.targets, None, None)


@pytest.mark.parametrize(
    ("token", "word", "match"),
    [("", "dog", "token"), ("two words", "dog", "one rare word"),
     ("sks", " ", "what the subject is"), ("sks", "x" * 101, "at most 100")],
)  # fmt: skip
def test_a_subject_without_a_name_is_refused(token: str, word: str, match: str) -> None:
    with pytest.raises(AppError, match=match):
        make_config(EMBEDDED, Path("p"), Path("o"), token, word, [], {})


def test_values_that_cannot_work_are_refused_with_their_name() -> None:
    with pytest.raises(ConfigError, match="rank is 0"):
        config(rank=0)
    with pytest.raises(ConfigError, match="optimizer"):
        config(optimizer="rm -rf")
