"""The page's choices become settings, and settings become a command with the same."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.cli.commands.train import train_config
from dora_diffusion.cli.main import build_parser
from dora_diffusion.config import (
    PRESETS,
    TrainConfig,
)
from dora_diffusion.models.memory import Device, needed_memory
from dora_diffusion.studio.app.settings import (
    ADVANCED,
    EMBEDDED,
    GROUPS,
    SETTINGS,
    command_line,
    make_config,
    preset_values,
    setting_text,
    shown_choices,
    token_advice,
)
from dora_diffusion.studio.jobs.bases import check_model
from dora_diffusion.studio.jobs.store import UserError
from tests.every import every
from tests.refusal import refused

SLIDER = {"target": "a dog", "positive": "a big dog\n", "negative": " a tiny dog", "anchors": ""}


def config(**changes: object) -> TrainConfig:
    advanced = preset_values("balanced", EMBEDDED) | changes
    return make_config(
        EMBEDDED, Path("my photos"), Path("runs/x"), "sks", "toy robot", ["a {subject} at night"],
        advanced,
    )  # fmt: skip


def made_of(model: str, values: Mapping[str, Any]) -> TrainConfig:
    """Settings of a dog, or of a slider where that is taught."""
    token = "<sks>" if values["train_text_encoder_ti"] else "sks"
    return make_config(model, Path("p"), Path("o"), token, "dog", [], {**SLIDER, **values})


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def test_every_preset_is_a_valid_config() -> None:
    with every() as case:
        for preset, model in itertools.product(PRESETS, (EMBEDDED, "org/model", SDXL)):
            with case((preset, model)):
                values = preset_values(preset, model)
                assert set(values) == set(ADVANCED) <= set(SETTINGS)
                made = made_of(model, values)
                assert made.center_crop  # the crop that the Subject tab shows
                assert made.checkpointing_steps != 0  # Stop and Resume need checkpoints


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
    assert words[words.index("--pretrained_model_name_or_path") + 1] == EMBEDDED
    assert train_config(build_parser().parse_args(words[4:])) == one


def test_names_of_models_and_paths_stay_as_they_are() -> None:
    name = "/data/My  models/Ünique  One.safetensors"
    one = make_config(name, Path("p"), Path("o"), "sks", "mug", [], {"class_data_dir": f" {name} "})
    assert one.pretrained_model_name_or_path == one.class_data_dir == name
    for wrong in ("x" * 501, "org/mo\ndel"):
        with pytest.raises(UserError, match="the model name has more than 500 characters, or"):
            make_config(wrong, Path("p"), Path("o"), "sks", "mug", [], {})


def test_a_switch_that_follows_from_the_model_has_three_states(tmp_path: Path) -> None:
    name = "zero_terminal_snr"
    assert [value for _, value in shown_choices(SETTINGS[name])] == ["", "on", "off"]
    for shown, expected in (("", None), (None, None), ("on", True), ("off", False)):
        config = make_config(
            model="m", photos=tmp_path, output_dir=tmp_path, token="sks", class_word="dog",
            prompts=[], advanced={name: shown},
        )  # fmt: skip
        assert getattr(config, name) is expected


def test_presets_follow_the_device_but_for_the_toy_models() -> None:
    def chosen(preset: str, model: str, free: float, kind: str = "cuda") -> tuple[Any, ...]:
        values = preset_values(preset, model, Device(kind, "x", free, True, True))
        names = ("mixed_precision", "gradient_checkpointing", "optimizer")
        return tuple(values[name] for name in names)

    assert chosen("fast", SDXL, 80) == ("bf16", False, "adamw")
    assert chosen("fast", SDXL, 2) == ("bf16", True, "adamw8bit")
    assert chosen("fast", SDXL, 80, "cpu") == ("no", False, "adamw")
    default = TrainConfig()
    assert chosen("fast", EMBEDDED, 0.1) == (
        default.mixed_precision, default.gradient_checkpointing, default.optimizer,
    )  # fmt: skip
    # Prior preservation doubles a batch.
    memory = {"mixed_precision": "bf16", "gradient_checkpointing": False}
    device = Device("cuda", "x", None)
    needed = needed_memory("sdxl", 1024, memory, device)
    assert needed is not None
    assert chosen("fast", SDXL, needed) == ("bf16", False, "adamw")
    assert chosen("balanced", SDXL, needed) == ("bf16", True, "adamw")


def test_fields_hold_text_that_comes_back_as_the_value() -> None:
    for model in (EMBEDDED, SDXL):
        for preset in PRESETS:
            values = preset_values(preset, model)
            typed = {name: setting_text(value) for name, value in values.items()}
            assert all(isinstance(text, str | bool) for text in typed.values())
            made = made_of(model, typed)
            assert {name: getattr(made, name) for name in ADVANCED} == values


@pytest.mark.parametrize(
    ("name", "text"),
    [("rank", "eight"), ("rank", "0"), ("magnitude_lr", "1e-4x"), ("optimizer", "rm -rf")],
)
def test_what_cannot_be_is_refused_by_name(name: str, text: str) -> None:
    """Ranges are those of the settings."""
    with refused(name, text):
        config(**{name: text})


def test_paths_are_looked_for_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for changes, match in (
        ({"pretrained_vae_model_name_or_path": "/no/vae"}, "the VAE /no/vae does not exist"),
        ({"model_config": str(tmp_path)}, "no model_index.json"),
        ({"class_data_dir": str(tmp_path / "file")}, "is a file; give a folder"),
    ):
        with pytest.raises(UserError, match=match):
            check_model(config(**changes))
    check_model(config(class_data_dir=str(tmp_path / "to be made")))


def test_every_setting_has_a_field_but_those_that_the_page_decides() -> None:
    # Typed again here on purpose: a new setting must be given a field, or be listed with a reason.
    own_field = {"pretrained_model_name_or_path", "token", "class_word", "validation_prompt"}
    own_field |= {*SLIDER}
    the_app_s = {
        "dataset_config", "instance_data_dir", "instance_prompt", "output_dir",
        "overwrite_output_dir", "resume_from_checkpoint", "logging_dir", "push_to_hub",
        "hub_model_id", "feature",
    }  # fmt: skip
    every = {field.name for field in dataclasses.fields(TrainConfig)}
    assert every - set(ADVANCED) == own_field | the_app_s
    assert [name for names in GROUPS.values() for name in names] == list(ADVANCED)
    for group, names in GROUPS.items():
        assert {SETTINGS[name].group for name in names} == {group}


@pytest.mark.parametrize(
    ("token", "word", "match"),
    [
        ("", "dog", "token"),
        ("two words", "dog", "one rare word"),
        ("sks", " ", "what the subject is"),
        ("sks", "x" * 101, "at most 100"),
    ],
)
def test_a_subject_without_a_name_is_refused(token: str, word: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_config(EMBEDDED, Path("p"), Path("o"), token, word, [], {})


def test_a_preset_with_a_token_of_its_own_says_what_to_type_in_the_app() -> None:
    assert {name: token_advice(name) for name in PRESETS if token_advice(name)} == {
        "fast-word": "Type a new word such as <sks> as Token.",
        "style": "Leave Token and Class empty.",
    }
