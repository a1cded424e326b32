"""Runs by two processes, and the same by one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.processes import has_sharding
from tests.training.helpers import losses, make_config, small_samples
from tests.waiting import WAIT_SECONDS

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
needs_sharding = pytest.mark.skipif(not has_sharding(), reason="this torch does not shard models")
EVERYTHING = {
    "method": "full", "max_train_steps": 2, "checkpointing_steps": 1, "train_text_encoder": True,
    "text_encoder_lr": 1e-3, "with_prior_preservation": True, "class_word": "mug",
    "gradient_accumulation_steps": 2, "validation_split": 1, "num_validation_images": 1,
    "validation_inference_steps": 1, "max_grad_norm": 0.5, "ema_decay": 0.5,
}  # fmt: skip


def settings(model: Path, output: Path, **changes: Any) -> TrainConfig:
    """Of a run in which rounding stays rounding: Adam's first steps are the gradients' signs."""
    changes = {"adam_epsilon": 1e-2, "train_batch_size": 2, **changes}
    return make_config(model, small_samples() / "bolt_mug", output, **changes)


def shared(config: TrainConfig, output: Path, **changes: Any) -> TrainConfig:
    """The same over two processes that share the model: each has one of a batch's two photos."""
    changes = {"sharding": "fsdp", "train_batch_size": 1, "output_dir": str(output), **changes}
    return replace(config, **changes)


def train_by_two(
    configs: list[TrainConfig], folder: Path, *, is_last_wrong: bool = False
) -> list[dict[str, Any]]:
    """Train each; what the first process and the second one tell.

    In the last one, if it is to go wrong, the second process has a gradient of NaN at step 3.
    """
    folder.mkdir()
    plain = [config.to_dict() for config in configs]
    (folder / "configs.json").write_text(json.dumps(plain), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.two_processes", folder / "configs.json",
         folder / "told", *["wrong"] * is_last_wrong],
        capture_output=True, text=True, encoding="utf-8", timeout=WAIT_SECONDS, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"told-{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Trained parameters of a run or checkpoint."""
    if (folder / "model").is_dir() or (folder / "model_index.json").is_file():
        place = folder / "model" if (folder / "model").is_dir() else folder
        with open_model(str(place)) as model:
            return {
                n: model[n]
                for n in model.specs
                if n.startswith(("unet.", "transformer.", "text_encoder."))
            }
    return {
        f"{name}.{part}": tensor
        for name, layer in read_adapter(folder).layers.items()
        for part in ("down", "up", "magnitude")
        if (tensor := getattr(layer, part)) is not None
    }


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses of each step, and the result."""
    for figure in ("loss", "validation_loss", "grad_norm"):
        ours, theirs = losses(one, figure), losses(other, figure)
        shared_steps = sorted(ours.keys() & theirs.keys())
        assert shared_steps or figure == "validation_loss"
        for step in shared_steps:
            assert theirs[step] == pytest.approx(ours[step], rel=tolerance), (figure, step)
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
        )


class Runs(NamedTuple):
    """Folders of the runs by name, and what two processes tell of theirs."""

    folder: Path
    told: list[dict[str, Any]]


def agreeing(model: Path, folder: Path, variant: dict[str, Any]) -> tuple[TrainConfig, TrainConfig]:
    """A run by one process, and by two that have half of each batch; neither shares its model."""
    photos = Path(shutil.copytree(small_samples() / "heart_teapot", folder / "photos"))
    config = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks teapot",
        "resolution": 32,
        "rank": 2,
        "conv_rank": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "train_text_encoder": True,
        "text_encoder_lr": 1e-3,
        "with_prior_preservation": True,
        "prior_preservation_mode": "images",
        "num_class_images": 3,
        "validation_inference_steps": 2,
        "num_validation_images": 1,
        "checkpointing_steps": 2,
        "random_flip": True,
        "gradient_accumulation_steps": 2,
        "validation_split": 3,
        **variant,
    }
    for text in photos.glob("*.txt") if "token" in variant else ():
        text.write_text(text.read_text("utf-8").replace("sks", variant["token"]), encoding="utf-8")
    sizes = {"agree-1": 4, "agree-2": 2}
    one, two = (
        TrainConfig.from_dict(config | {"train_batch_size": size, "output_dir": str(folder / name)})
        for name, size in sizes.items()
    )
    return one, two


def assert_agree(one: Path, two: Path, token: str = "") -> None:
    """Adapters, losses and words, to what rounding makes of them; the first loss to the bit."""
    first, second = read_adapter(one).layers, read_adapter(two).layers
    assert set(first) == set(second)
    for name, layer in first.items():
        for part in ("down", "up", "magnitude"):
            torch.testing.assert_close(
                getattr(layer, part), getattr(second[name], part), rtol=2e-3, atol=5e-5
            )
    assert list(losses(two)) == [1, 2, 3]
    alone, both = (losses(folder, "validation_loss") for folder in (one, two))
    assert list(alone) == list(both) == [0, 3]
    assert alone[0] == both[0]
    assert alone[3] == pytest.approx(both[3], rel=1e-4)
    words, others = (read_adapter(folder).tokens for folder in (one, two))
    assert list(words) == list(others) == [token] * bool(token)
    for word, vectors in words.items():
        torch.testing.assert_close(vectors, others[word], rtol=2e-3, atol=5e-4)
