"""The segments that docs/howto/resume.md shows are of settings that may change."""

from __future__ import annotations

from pathlib import Path

import yaml

from dora_diffusion.config import TrainConfig, settings
from dora_diffusion.config.file import SEGMENTS

TEXT = (Path(__file__).parents[2] / "docs" / "howto" / "resume.md").read_text(
    encoding="utf-8"
)


def test_the_segments_that_are_shown_are_of_free_settings() -> None:
    block = TEXT.split("```yaml\n")[1].split("```")[0]
    free = {setting.name for setting in settings() if setting.resume == "free"}
    for segment in yaml.safe_load(block)[SEGMENTS]:
        assert set(segment["settings"]) <= free
    first = yaml.safe_load(block)[SEGMENTS][0]["settings"]
    assert first["learning_rate"] == TrainConfig().usual_lr
