"""The end of a run that has moved no trained number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_diffusion.cli.main import main
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.events import SubjectLeft, TrainingEnded
from dora_diffusion.training.metrics import MetricsLog, TrainingError
from dora_diffusion.training.pack import train_pack
from dora_diffusion.training.recipe import train
from dora_diffusion.training.results.record import has_learned_nothing

Make = Callable[..., TrainConfig]


def learned(config: TrainConfig) -> bool:
    record = json.loads((Path(config.output_dir) / "run.json").read_text("utf-8"))
    return bool(record["learned"])


def test_a_run_that_moved_nothing_is_not_done(tiny_run: Make, tmp_path: Path, capsys) -> None:
    config = tiny_run(learning_rate=0.0)
    told: list[Any] = []
    with pytest.raises(TrainingError) as error:
        train(config, told.append)
    written = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert str(error.value) == (
        f"nothing was learned: no trained number has moved. {written} was written but has no "
        "effect. Raise learning_rate (0) or max_train_steps (4), or lower lr_warmup_steps"
    )
    assert written.is_file()
    assert not any(isinstance(event, TrainingEnded) for event in told)
    assert has_learned_nothing(tmp_path / "out")
    flags = ["--config", str(tmp_path / "out" / "config.yaml"), "--overwrite_output_dir"]
    assert main(["train", *flags]) == 1
    out, err = capsys.readouterr()
    assert "done:" not in out
    assert err.strip().splitlines()[-1].startswith("error: nothing was learned: ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "lora"},
        {"init": "pissa"},
        {"parametrization": "vera", "vera_rank": 8},
        {"parametrization": "adalora", "allocation_warmup": 0, "allocation_final": 0},
        {"method": "full", "learning_rate": 1e-5},
        {"train_text_encoder": True, "learning_rate": 0.0, "text_encoder_lr": 1e-4},
        {"ema_decay": 0.9, "mixed_precision": "bf16"},
        {"optimizer": "adamw-schedule-free"},
    ],
    ids=["dora", "lora", "pissa", "vera", "adalora", "full", "encoder", "average", "schedule-free"],
)
def test_one_step_of_any_run_moves_a_number(tiny_run: Make, settings: dict[str, Any]) -> None:
    """Of a LoRA B, whose gradient alone is not 0 in the first step."""
    config = tiny_run(**{"max_train_steps": 1, "learning_rate": 1e-4, **settings})
    train(config)
    assert learned(config)


def test_gradients_of_0_are_named(tiny_run: Make, monkeypatch) -> None:
    """With a decay, which moves the factor that is not 0."""
    loss = "dora_diffusion.training.terms.denoising_loss"
    monkeypatch.setattr(loss, lambda prediction, *_: 0 * prediction.flatten(1).sum(dim=1))
    config = tiny_run(adam_weight_decay=0.5, learning_rate=0.1)
    cause = "nothing was learned: all gradients were 0. .* Check the masks of the photos and mixed"
    with pytest.raises(TrainingError, match=cause):
        train(config)
    assert not learned(config)


def test_steps_that_fp16_skipped_are_known(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, lambda record: None, skips=9)
    found = [log.largest_norm]
    for step, norm in enumerate((torch.inf, 2.0, torch.inf, 1.0), start=1):
        log.add({"step": step, "loss": 1.0, "grad_norm": torch.tensor(norm)})
        log.flush()
        found.append(log.largest_norm)
    assert found == [None, torch.inf, 2.0, 2.0, 2.0]


def test_a_start_that_is_not_moved_is_nothing(tiny_run: Make, tmp_path: Path) -> None:
    first = tiny_run(output_dir=str(tmp_path / "first"), learning_rate=1e-2)
    train(first)
    again = tiny_run(init_adapter=str(tmp_path / "first"), learning_rate=0.0)
    with pytest.raises(TrainingError, match="nothing was learned") as error:
        train(again)
    written = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    has = f"{written} was written but equals init_adapter first, from which it started. Raise "
    assert has in str(error.value)
    moved = replace(again, learning_rate=1e-3, overwrite_output_dir=True)
    train(moved)
    assert learned(moved)


def test_a_resumed_run_is_compared_with_the_start_of_the_first(
    tiny_run: Make, tmp_path: Path
) -> None:
    """Learning counts from the first run: the resumed steps alone move nothing here."""
    half = tiny_run(max_train_steps=1, checkpointing_steps=1, learning_rate=1e-3)
    train(half)
    resumed = replace(
        half, max_train_steps=2, learning_rate=0.0, resume_from_checkpoint="latest",
        overwrite_output_dir=True,
    )  # fmt: skip
    train(resumed)
    assert learned(resumed)
    shutil.rmtree(half.output_dir)
    with pytest.raises(TrainingError, match="no trained number has moved"):
        train(replace(half, learning_rate=0.0))
    with pytest.raises(TrainingError, match="no trained number has moved"):
        train(resumed)


def test_a_subject_that_moved_nothing_leaves_its_pack(tiny_run: Make, tmp_path: Path) -> None:
    configs = {
        name: tiny_run(output_dir=str(tmp_path / name), learning_rate=rate, max_train_steps=2)
        for name, rate in (("moved", 1e-3), ("still", 0.0))
    }
    told: list[tuple[str, Any]] = []
    result = train_pack(configs, lambda name, event: told.append((name, event)))
    assert list(result.results) == ["moved"]
    assert "nothing was learned" in str(result.failures["still"])
    assert [name for name, event in told if isinstance(event, TrainingEnded)] == ["moved"]
    assert [name for name, event in told if isinstance(event, SubjectLeft)] == ["still"]
    again = {name: replace(c, resume_from_checkpoint="latest") for name, c in configs.items()}
    result = train_pack(again)
    assert list(result.results) == ["moved"], "neither is it done when the pack is resumed"
    assert "has learned nothing" in str(result.failures["still"])
