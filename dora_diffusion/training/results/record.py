"""``run.json``: versions and hardware, on which exact results depend, and the outcome."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dora_diffusion import __version__
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.models.components import Components
from dora_diffusion.numerics.devices import device_name
from dora_diffusion.training.results.checkpoint import FORMAT
from dora_diffusion.training.results.folders import RECORD_NAME

Conditions = dict[str, str]

# torch is not listed, since `torch.__version__` is more precise.
_PACKAGES = ("diffusers", "transformers", "tokenizers", "accelerate", "numpy", "pillow")
# Compared as a setting (mixed_precision) already.
_OF_SETTINGS = ("weights",)


def conditions_of(components: Components, accelerator: Any) -> Conditions:
    """Return the conditions of bitwise reproducibility: versions, device, threads and flags."""
    kind, weight = components.device.type, next(components.denoiser.parameters())
    name = device_name(kind)
    if kind == "cpu":
        name += f" with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "dora-diffusion": __version__,
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in _PACKAGES},
        "device": name,
        "threads": str(torch.get_num_threads()),
        "processes": str(accelerator.num_processes),
        "weights": str(weight.dtype).removeprefix("torch."),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "cuDNN benchmark": str(torch.backends.cudnn.benchmark),
    }


def changed_conditions(name: str, before: Mapping[str, str], now: Conditions) -> str:
    """Return a message if a checkpoint was written under other conditions, else an empty one.

    Example:
        >>> changed_conditions("checkpoint-4", {"torch": "2.4.0"}, {"torch": "2.5.1"})
        'checkpoint-4 was written with torch 2.4.0, but this run has torch 2.5.1: the resumed run will not be bitwise identical'
    """  # noqa: E501
    known = {key: before.get(key, "unknown") for key in now if key not in _OF_SETTINGS}
    names = [key for key, value in known.items() if value != now[key]]
    if not names:
        return ""
    old, new = (", ".join(f"{key} {of[key]}" for key in names) for of in (known, now))
    return (
        f"{name} was written with {old}, but this run has {new}: the resumed run will not be "
        "bitwise identical"
    )


def save_record(
    folder: Path, conditions: Sequence[Mapping[str, Any]], learned: bool | None = None
) -> Path:
    """Write ``run.json``: the conditions, each with its first step, and the outcome.

    Args:
        folder: Output folder of the run.
        conditions: Versions and hardware (`conditions_of`).
        learned: Whether training has changed the result; None before the end.
    """
    record = {"format": FORMAT, "conditions": conditions, "learned": learned}
    return save_text(folder / RECORD_NAME, json.dumps(record, indent=1) + "\n")


def has_learned_nothing(folder: Path) -> bool:
    """Return whether a completed run in the folder has changed nothing, by its record."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return record["learned"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False
