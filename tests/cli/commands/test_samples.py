"""``dora-diffusion samples``: sample subjects to train on from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.config import TrainConfig, read_config_file

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("folder", ["samples", "deep/er", "{tmp}/absolute"])
def test_settings_name_the_copied_photos(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = folder.format(tmp=tmp_path)
    assert main(["samples", folder]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"dora-diffusion train --config {folder}/{name}/config.yaml"
        for name in ("bolt_mug", "heart_teapot", "ring_robot")
    ]
    for line in printed:
        config = TrainConfig.from_dict(read_config_file(line.split()[-1]))
        assert config.instance_data_dir == str(Path(line.split()[-1]).parent)
    for original in (ROOT / "samples").rglob("*.[jt][px][gt]"):
        copy = Path(folder) / original.relative_to(ROOT / "samples")
        assert copy.read_bytes() == original.read_bytes()


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert main(["samples", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists; give another folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
