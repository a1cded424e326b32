"""``dora-diffusion demo``: the sample's settings, with what the flags change; run in the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.cli import main as cli
from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.toy.command import DemoSettings, demo_config

SAMPLES = Path(__file__).parents[3] / "samples"


@pytest.mark.parametrize("subject", ["bolt_mug", "heart_teapot", "ring_robot"])
def test_a_sample_is_trained_as_its_settings_say(subject: str, tmp_path: Path) -> None:
    settings = DemoSettings(subject=subject, output=tmp_path, max_train_steps=7)
    made = demo_config(settings).to_dict()
    sample = TrainConfig.from_dict(read_config_file(SAMPLES / subject / "config.yaml")).to_dict()
    changed = {name: value for name, value in made.items() if value != sample[name]}
    assert changed == {
        "instance_data_dir": str(SAMPLES / subject),
        "output_dir": str(tmp_path / subject),
        "overwrite_output_dir": True,
        "max_train_steps": 7,
    }


def test_without_a_number_of_steps_the_sample_s_own_are_taken() -> None:
    sample = read_config_file(SAMPLES / "bolt_mug" / "config.yaml")
    assert demo_config(DemoSettings()).max_train_steps == sample["max_train_steps"]


def test_a_subject_that_is_none_is_answered_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--subject", "bolt_cup"])
    assert "choose bolt_mug, heart_teapot, ring_robot" in capsys.readouterr().err
