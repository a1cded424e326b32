"""Three subjects on a tiny random model, and what they are when nothing goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.cluster.fleet.run import Fleet, run_fleet
from dora_diffusion.config import TrainConfig
from tests.cluster.fleet.helpers import NAMES, SAMPLES


def tiny_subject(model: Path, name: str, **changes: object) -> TrainConfig:
    """Four steps with a checkpoint at every second one."""
    return TrainConfig(
        **{
            "pretrained_model_name_or_path": str(model),
            "instance_data_dir": str(SAMPLES / name),
            "instance_prompt": f"a photo of a sks {name.partition('_')[2]}",
            "resolution": 32,
            "rank": 2,
            "conv_rank": 2,
            "targets": ["cross-attention"],
            "max_train_steps": 4,
            "checkpointing_steps": 2,
            "num_validation_images": 0,
            **changes,
        }
    )


@pytest.fixture(scope="session")
def subjects(sd1_folder: Path) -> dict[str, TrainConfig]:
    """Settings of each subject; the last one has sample images."""
    images = {"num_validation_images": 1, "validation_inference_steps": 1}
    return {
        name: tiny_subject(sd1_folder, name, **(images if name == NAMES[-1] else {}))
        for name in NAMES
    }


@pytest.fixture(scope="session")
def serial(subjects: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The fleet of one process that nothing disturbs."""
    return run_fleet(subjects, tmp_path_factory.mktemp("fleet") / "serial")
