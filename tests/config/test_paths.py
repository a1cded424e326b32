"""Paths in a run's settings file: they move with its folder, and nothing else does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_diffusion.config import ConfigError, TrainConfig, read_config_file, settings
from dora_diffusion.config.derived import as_yaml, relative_paths
from dora_diffusion.config.file import resolve_paths

NAMES = [setting.name for setting in settings() if setting.is_path and setting.kind is not dict]
MARK = {"paths": "relative to this file"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: Any) -> Path:
    """A working folder with a run, what is in and beside it, and something far away."""
    folder = tmp_path / "project"
    for name in ("my-run/inner", "photos/mug", "../far", ".hidden"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_path_setting_moves_with_the_run(name: str, project: Path) -> None:
    written = {
        "my-run": "./", ".": "../", "my-run/inner": "./inner", "photos/mug": "../photos/mug",
        ".hidden": "../.hidden", str(project / "photos"): "../photos", "": "",
        "../far": str(project.parent / "far"), str(project.parent / "far"): None,
    }  # fmt: skip
    for given, wanted in written.items():
        kept = relative_paths({name: given}, "my-run")
        assert kept == {name: given if wanted is None else wanted}
        read = resolve_paths({**MARK, **kept}, "my-run")[name]
        assert Path(read).resolve() == Path(given).resolve() or not given
        if not Path(given).is_absolute() and not given.startswith(".."):
            assert read == given
        elsewhere = resolve_paths({**MARK, **kept}, "/new/my-run")[name]
        assert elsewhere == ("" if not given else os.path.normpath(
            f"/new/my-run/{wanted}" if (wanted or "").startswith(".") else kept[name]))  # fmt: skip
        assert resolve_paths(kept, "/new/my-run") == kept  # A file that a person wrote.


def test_paths_of_entries_move_too(project: Path) -> None:
    names = sorted(s.name for s in settings() if s.of_subject and s.name in NAMES)
    assert names
    entry = {**dict.fromkeys(names, "photos/mug"), "instance_prompt": "a sks mug"}
    moved = relative_paths({"dataset_config": [entry]}, "my-run")["dataset_config"][0]
    assert moved == {**dict.fromkeys(names, "../photos/mug"), "instance_prompt": "a sks mug"}
    again = resolve_paths({**MARK, "dataset_config": [moved]}, "my-run")
    assert again == {"dataset_config": [entry]}


def test_a_copied_folder_has_the_paths_of_its_new_place(project: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        instance_data_dir="photos/mug", instance_prompt="a sks mug", output_dir="my-run",
        class_data_dir=str(project / "my-run" / "class"), with_prior_preservation=True,
    )  # fmt: skip
    Path("my-run/config.yaml").write_text(as_yaml(config, Path("my-run")), encoding="utf-8")
    here = TrainConfig.from_dict(read_config_file("my-run/config.yaml"))
    assert here == TrainConfig.from_dict({**config.to_dict(), "class_data_dir": "my-run/class"})
    copied = tmp_path / "another" / "place"
    shutil.copytree(project, copied)
    there = read_config_file(copied / "my-run" / "config.yaml")
    assert there["instance_data_dir"] == str(copied / "photos" / "mug")
    assert there["class_data_dir"] == str(copied / "my-run" / "class")
    assert there["output_dir"] == str(copied / "my-run")
    assert "paths" not in there


def test_another_meaning_of_paths_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"paths": "absolute"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"paths is .absolute.; write .paths: relative to"):
        read_config_file(file)
