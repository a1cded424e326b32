"""Refusals of what former versions had, in every place where it may still be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dora_diffusion.cli import main as cli
from dora_diffusion.cli.axes import read_axis
from dora_diffusion.cluster.serving.api import value_line
from dora_diffusion.config.config_file import read_config_file
from dora_diffusion.config.derived import removed_settings
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.flag_map import REMOVED, find_setting, find_training_setting, removal
from dora_diffusion.config.train import TrainConfig, settings_by_name

NAMES = sorted(REMOVED)
FLAGS = {c: {s.name for s in cli.settings_of(c).settings()} for c in cli.COMMANDS if c != "train"}
FLAGS["train"] = set(settings_by_name())
FLAGS["fleet"] |= FLAGS["train"]


@pytest.fixture(scope="module")
def parser():
    return cli.build_parser()


@pytest.mark.parametrize("name", NAMES)
def test_a_removed_name_is_refused_with_its_advice(name, parser, capsys, tmp_path: Path) -> None:
    """As a flag, key of a file, field of a request, or command, unless a setting has the name."""
    text, trains = f"{name} was removed: {REMOVED[name]}", name in settings_by_name()
    assert removal(name) == text
    commands = [c for c in FLAGS if name not in FLAGS[c]]
    assert "train" in commands or trains
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([command, f"--{name.replace('_', '-')}", "1"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: --{text}"
    if not trains:
        assert removed_settings(TrainConfig().to_dict() | {name: 7}) == {name: 7}
        with pytest.raises(ConfigError) as error:
            find_training_setting(name, settings_by_name())
        assert str(error.value) == text
    with pytest.raises(ConfigError) as error:
        find_setting(name, {})
    assert str(error.value) == text
    if name not in FLAGS["generate"]:
        with pytest.raises(ConfigError) as error:
            read_axis(f"{name}=1", {})
        assert str(error.value) == text
    assert value_line({"type": "extra_forbidden", "loc": ("body", name)}) == text


def test_a_removed_command_is_refused_with_its_advice(capsys, parser) -> None:
    for name in NAMES:
        if name not in cli.COMMANDS:
            with pytest.raises(SystemExit):
                parser.parse_args([name])
            said = capsys.readouterr().err.splitlines()[-1]
            assert said == f"error: there is no command {name!r}: {REMOVED[name]}"


def test_a_former_runs_file_is_read_if_its_removed_settings_had_no_effect(tmp_path: Path) -> None:
    values = dict.fromkeys(sorted({*REMOVED} - {*cli.COMMANDS}), False) | {"weight": 1.0, "rank": 2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert TrainConfig.from_dict(read_config_file(file)) == TrainConfig(rank=2)
    assert TrainConfig.from_dict(values) == TrainConfig(rank=2)
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(values | {"weight": 0.5})
    assert str(error.value) == f"weight was removed: {REMOVED['weight']}"
    entry = {"instance_data_dir": "a", "wildcards": True}
    before = TrainConfig().to_dict() | {"dataset_config": [entry, {"weight": 1.0}]}
    assert removed_settings(before) == {"wildcards": True}
