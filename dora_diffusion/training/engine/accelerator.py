"""Devices, processes and precision of a run, by Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.models.offload import fetch, send
from dora_diffusion.models.precision import precision_of, require_trains
from dora_diffusion.numerics.devices import default_device
from dora_diffusion.numerics.precision import allow_tf32
from dora_diffusion.training.engine.sharding import wants_sharding


def make_accelerator(config: TrainConfig) -> Any:
    """The accelerator, which knows devices, processes and precision.

    Raises:
        ConfigError: If the precision is not possible here, the tracker is not installed, or what
            it is launched with and the settings do not go together.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, patch_environment

    precision = precision_of(config.mixed_precision)
    require_trains(default_device(), precision)
    if config.report_to and find_spec(config.report_to) is None:
        raise ConfigError(
            f"report_to {config.report_to} needs a package that is not installed; "
            f"run 'pip install {config.report_to}'"
        )
    shards = wants_sharding(config)
    # A process may train more than once, with another precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    if config.allow_tf32:
        allow_tf32()
    # Adapters do without: their frozen model is in the precision already, where autocast would
    # widen what norms make and cast it back, and an adapted layer casts its own parameters.
    autocast = AutocastKwargs(enabled=config.is_full)
    # `training.engine.sharding` does what it asks for.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator: Any = Accelerator(
            mixed_precision=precision,
            log_with=config.report_to,
            project_dir=str(Path(config.output_dir, config.logging_dir)),
            # The other processes wait while the first one makes class images.
            kwargs_handlers=[autocast, InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )  # fmt: skip
    accelerator.shards = shards
    return accelerator


def shards_model(accelerator: Any) -> bool:
    """Return whether the processes share one model, which all of them call equally often."""
    return bool(getattr(accelerator, "shards", False))


def set_by_any(accelerator: Any, flag: bool) -> bool:
    """Return whether any process has set a flag; all wait for the answer."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum"))


class SharedFlags:
    """Flags that any process has set, so that all of them stop, and save, at the same step.

    Of several processes each reads what was asked for a step before, which has arrived by then:
    nothing waits. What is answered is not asked for again by the same call.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sent: Callable[[], Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Return the flags that any process has set. Every process calls it at every step."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        before = torch.zeros(len(flags)) if self._sent is None else self._sent()
        is_set = [bool(count) for count in before.tolist()]
        asked = [float(flag and not old) for flag, old in zip(flags, is_set, strict=True)]
        counts = send(torch.tensor(asked), accelerator.device)
        self._sent = fetch(accelerator.reduce(counts, reduction="sum"))
        return is_set
