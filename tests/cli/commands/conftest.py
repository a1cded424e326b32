"""A short run of ``dora-diffusion train``, whose result the other commands take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dora_diffusion.cli import main as cli
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.numerics.weights import LayerWeights
from tests.data.prepare.conftest import models  # noqa: F401 (a fixture)
from tests.shallow import *  # noqa: F403
from tests.training.helpers import small_samples


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a mug with their captions; to be read only."""
    folder = tmp_path_factory.mktemp("subject") / "photos"
    return Path(shutil.copytree(small_samples() / "bolt_mug", folder))


@pytest.fixture(scope="session")
def train_flags(sd1_folder: Path, photos: Path) -> Callable[..., list[str]]:
    """The flags of a short run into a folder, with changes by name."""

    def flags(output: Path, **changes: object) -> list[str]:
        values = {
            "pretrained_model_name_or_path": sd1_folder,
            "instance_data_dir": photos,
            "instance_prompt": "a photo of a sks mug",
            "output_dir": output,
            "resolution": 32,
            "rank": 2,
            "conv_rank": 2,
            "max_train_steps": 3,
            "num_validation_images": 0,
            "checkpointing_steps": 0,
            "learning_rate": "1e-2",
            **changes,
        }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return flags


@pytest.fixture(scope="session")
def trained(
    train_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a short run; to be read only."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *train_flags(output)]) == 0
    return output


@pytest.fixture
def last_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Gives the last line of stderr."""
    return lambda: capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A plain LoRA in Diffusers' key format, which does not say its family."""
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    draw = torch.Generator().manual_seed(0)
    layers = {
        f"{block}.{name}": LayerWeights(
            torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw), None, 3.0
        )
        for name in ("attn1.to_q", "attn1.to_k", "attn2.to_out.0")
    }
    return write_adapter(tmp_path / "lora", AdapterFile(layers), "diffusers")
