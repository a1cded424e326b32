"""TensorBoard and Weights & Biases: settings, the numbers of each step, and sample sheets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.metadata import without_paths

_PROJECT = "dreambooth"
# Settings that name folders of this computer: only a name goes to a tracker's server.


class Trackers:
    """The configured trackers; none where ``report_to`` is not set.

    A tracker that cannot write warns once, and training continues without it.
    """

    def __init__(self, accelerator: Any, enabled: bool) -> None:
        self._accelerator = accelerator
        self._enabled = enabled

    def begin(self, values: Mapping[str, Any]) -> None:
        """Open the trackers and give them the run's settings."""
        if not self._enabled:
            return
        self._accelerator.init_trackers(_PROJECT)
        for tracker in self._accelerator.trackers:
            self._attempt(partial(_store_settings, tracker, values))

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Log a step's numbers."""
        if self._enabled:
            self._attempt(partial(self._accelerator.log, step_tags(record), step=record["step"]))

    def log_images(self, tag: str, images: Sequence[Image.Image], step: int) -> None:
        """Log images of one size under a tag."""
        if not self._enabled:
            return
        # (n, height, width, 3)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        for tracker in self._accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self._attempt(partial(tracker.log_images, {tag: pixels}, step=step, **options))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._enabled = False
            warnings.warn(
                f"the tracker cannot write: {error}; training continues without it", stacklevel=3
            )


def step_tags(record: Mapping[str, Any]) -> dict[str, float]:
    """A step's record under the names that trackers show, grouped by what they are."""
    tags = {
        f"train/{name}": record[name]
        for name in ("loss", "prior_loss", "grad_norm")
        if record.get(name) is not None
    }
    tags |= {
        f"validation/{name}": record[f"validation_{name}"]
        for name in ("loss", "similarity")
        if record.get(f"validation_{name}") is not None
    }
    for kind in ("lr", "effective_lr"):
        tags |= {f"{kind}/{group}": rate for group, rate in record.get(kind, {}).items()}
    return tags


def tracked_settings(config: TrainConfig) -> dict[str, Any]:
    """Settings as plain values: lists are joined, and folders lose the way to them."""
    return {name: _plain(value) for name, value in without_paths(config.to_dict()).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return " | ".join(str(item) for item in value)
    return "" if value is None else value


def _store_settings(tracker: Any, values: Mapping[str, Any]) -> None:
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(dict(values))
        return
    from torch.utils.tensorboard.summary import hparams

    # Into the run's own file, so that its loss stands beside its settings in the HPARAMS tab.
    # Accelerate would make a run of its own for them.
    for summary in hparams(dict(values), {"train/loss": 0.0}):
        tracker.writer.file_writer.add_summary(summary)
    lines = [f"    {name}: {value}" for name, value in values.items()]
    tracker.writer.add_text("settings", "\n".join(lines))
