"""Checkpoints: everything that a run needs to resume exactly, beside an adapter to use at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.training.continuity import Contents, check_same_run
from dora_diffusion.training.flat import join_states

STATE_FILE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def parameters_by_name(trained: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every trained parameter by component and path."""
    return {
        f"{component}.{path}.{name}": parameter
        for component, model in trained.items()
        for path, layer in adapted_layers(model)
        for name, parameter in layer.adapters.named_parameters()
    }


def tensors_by_name(trained: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """`parameters_by_name`, and what adapters hold beside: where they started, and the like."""
    held: dict[str, torch.Tensor] = dict(parameters_by_name(trained))
    for component, model in trained.items():
        for path, layer in adapted_layers(model):
            for name, buffer in layer.adapters.named_buffers():
                held[f"{component}.{path}.{name}"] = buffer
    return held


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return checkpoints_after(output_dir, -1)


def checkpoints_after(output_dir: Path, step: int) -> list[Path]:
    """The complete checkpoints after a step, oldest first."""
    return [path for path in folders_after(output_dir, step) if (path / STATE_FILE).is_file()]


def folders_after(output_dir: Path, step: int) -> list[Path]:
    """Checkpoint folders after a step, oldest first, with those that hold an adapter alone."""
    folders = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for number, path in sorted(folders) if number > step]


def step_of(checkpoint: Path) -> int:
    """The step of ``checkpoint-STEP``; 0 for a folder of another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The checkpoint that ``resume_from_checkpoint`` names.

    Raises:
        ConfigError: If there is none.
    """
    if name == "latest":
        checkpoints = checkpoints_in(output_dir)
        if not checkpoints:
            raise ConfigError(
                f"{output_dir} holds no checkpoint to resume from (a run with "
                "--checkpointing_steps 0 keeps none); start over with --overwrite_output_dir, or "
                "leave out --resume_from_checkpoint"
            )
        return checkpoints[-1]
    places = (Path(name).expanduser(), output_dir / name)
    for path in places:
        if (path / STATE_FILE).is_file():
            return path
    if not any(path.exists() for path in places):
        others = checkpoints_in(output_dir)
        newest = f"; the newest in {output_dir} is {others[-1].name}" if others else ""
        raise ConfigError(f"the checkpoint {name} does not exist{newest}")
    raise ConfigError(f"{name} is not a checkpoint of a training run (it has no {STATE_FILE})")


def load_state(path: Path, config: TrainConfig, contents: Contents | None = None) -> dict[str, Any]:
    """Read a checkpoint's state, and check that it belongs to this run.

    Args:
        path: The checkpoint's folder.
        config: The settings of this run.
        contents: Its images, captions and masks; None compares settings only.

    Raises:
        ConfigError: If it cannot be read, or what must not change has changed.
    """
    try:
        # weights_only: the file holds tensors and plain values, and cannot run code.
        state: dict[str, Any] = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ConfigError(f"cannot read the checkpoint {path}: {error}") from error
    check_same_run(path.name, state, config, contents)
    return state


def restore_optimizer(optimizer: Any, lr_schedule: Any, state: Mapping[str, Any]) -> None:
    """Put saved moments and the schedule's place back; rates and decays stay those of this run.

    Args:
        optimizer: This run's, fresh.
        lr_schedule: This run's, fresh: a `LambdaLR`, or Accelerate's wrapper of one.
        state: What a checkpoint holds.

    Raises:
        ConfigError: If it is of other parameters.
    """
    settings = ("initial_lr", "weight_decay", "betas", "eps")
    fresh = [{k: group[k] for k in settings if k in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(_of_these(state["optimizer"], optimizer.param_groups))
    except ValueError as error:
        raise ConfigError(f"the checkpoint's optimizer does not fit this run's: {error}") from error
    lr_schedule.load_state_dict(state["lr_schedule"])
    plain = getattr(lr_schedule, "scheduler", lr_schedule)
    plain.base_lrs = [group["initial_lr"] for group in fresh]
    for group, values, factor in zip(optimizer.param_groups, fresh, plain.lr_lambdas, strict=True):
        group.update(values)
        group["lr"] = values["initial_lr"] * factor(plain.last_epoch)


def _of_these(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A saved optimizer's state; earlier versions kept each parameter's moments apart."""
    saved = sum(len(group["params"]) for group in state["param_groups"])
    if len(state["param_groups"]) == len(groups) < saved and all(
        len(group["params"]) == 1 for group in groups
    ):
        return join_states(state, groups)
    return state


def restore_tensors(tensors: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Put saved values into tensors, all of them.

    Raises:
        ConfigError: If names or shapes differ.
    """
    if {k: tuple(v.shape) for k, v in saved.items()} != {
        k: tuple(v.shape) for k, v in tensors.items()
    }:
        raise ConfigError("the checkpoint was trained in other layers or shapes than this run's")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
