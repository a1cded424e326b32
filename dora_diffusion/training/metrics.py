"""Metrics of a run: one JSON line per step and per validation, and trackers."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.adapter.metadata import without_paths
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.models.offload import fetch

_PROJECT = "dreambooth"
# Consecutive steps that fp16 may skip. The scaler halves its scale of 65,536 each time.
MOST_SKIPPED = 40
# Detection of a rising loss: number of initial losses, their mean times this factor is the
# threshold, largest ratio that a loss counts with, and cumulative sum that triggers the warning.
_START, _FACTOR, _MOST, _ALARM = 20, 3.0, 10.0, 25.0


class TrainingError(RuntimeError):
    """Error for a run that cannot continue."""


def require_finite(record: Mapping[str, Any], skipped: int = 0) -> None:
    """Check that the loss and the gradient norm of a step are finite.

    Args:
        record: Metrics of the step, on the host.
        skipped: Number of preceding steps that the fp16 scaler skipped, for the message.

    Raises:
        TrainingError: If one of them is not finite.
    """
    loss, norm, step = float(record["loss"]), float(record.get("grad_norm", 0)), record["step"]
    if math.isfinite(loss) and math.isfinite(norm):
        return
    wrong = f"the gradients are not finite at step {step}"
    if not math.isfinite(loss):
        wrong = f"the loss is {loss} at step {step}"
    before = f", as at the {counted(skipped, 'step')} before" if skipped else ""
    raise TrainingError(
        f"{wrong}{before}; nothing is saved from there on: resume from an earlier checkpoint, or "
        "start over, with a lower learning rate (or, if it trains in fp16, with --mixed_precision "
        "bf16)"
    )


def skip_if_not_finite(
    record: Mapping[str, Any], parameters: Iterable[Tensor], optimizer: Any
) -> None:
    """Skip the optimizer's step if loss or gradients are not finite, without synchronization.

    A fused optimizer on CUDA skips the step by a flag, as with a gradient scaler. Other optimizers
    on a GPU get gradients of 0, so that no NaN reaches the weights. `MetricsLog` reports the step
    after its metrics have arrived on the host.

    Args:
        record: Metrics of the step.
        parameters: Parameters of the optimizer.
        optimizer: The optimizer.

    Raises:
        TrainingError: If they are not finite, on a CPU.
    """
    norm: Tensor = record["grad_norm"]
    if norm.device.type == "cpu":
        require_finite(record)
        return
    is_wrong = (norm + record["loss"]).isfinite().logical_not()
    if norm.device.type == "cuda" and optimizer.defaults.get("fused"):
        optimizer.found_inf = is_wrong.float()
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(is_wrong, 0)


@contextlib.contextmanager
def naming_step(noun: str, step: int) -> Iterator[None]:
    """Convert a `ValueError` of weights that cannot be written to a `TrainingError`."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(
            f"the {noun} after step {step} is not written: {error}. If numbers are not finite, "
            "resume from an earlier checkpoint, or start over, with a lower learning rate"
        ) from error


def is_validation(record: Mapping[str, Any]) -> bool:
    """Return whether a record belongs to a validation, not to a training step."""
    return any(name.startswith("validation_") for name in record)


class LossWatch:
    """Detector of a loss that rises far above its initial level.

    The detector is a cumulative sum (Page 1954) of the distance of each loss above `_FACTOR` times
    the mean of the first `_START` losses. A single loss is not significant: with one photo per step
    it varies a hundredfold with the timestep. A divergence within the first `_START` steps is not
    detected, since the initial level is then too high.

    Attributes:
        risen_at: Step at which the sum exceeded `_ALARM`; None if it has not.
    """

    def __init__(self) -> None:
        self.risen_at: int | None = None
        self._first: list[float] = []
        self._sum = 0.0
        self._raised: set[int] = set()

    def add(self, step: int, loss: float) -> None:
        """Add the loss of the next step."""
        if len(self._first) < _START:
            self._first.append(loss)
            return
        start = sum(self._first) / _START
        self._sum = max(0.0, self._sum + min(loss / max(start, 1e-12), _MOST) - _FACTOR)
        if self._sum:
            self._raised.add(step)
        if self._sum > _ALARM and self.risen_at is None:
            self.risen_at = step

    def is_stable(self, step: int) -> bool:
        """Return whether the cumulative sum was 0 at a step."""
        return step not in self._raised


class MetricsLog:
    """Log of a run's metrics. They are read from the device one step late, to avoid waiting.

    Args:
        path: ``metrics.jsonl``, to which lines are appended; None: nothing is written.
        start_step: Step from which the run is resumed. Lines of later steps are dropped.
        on_record: Called with the record of each step.
        skips: Number of consecutive steps whose gradients may be non-finite, as fp16 skips them.

    Attributes:
        steps_dropped: Number of steps whose lines were dropped.
        largest_norm: Largest gradient norm of all steps that this process has taken and fp16 has
            not skipped; infinite if all were skipped, None before the first.
        watch: Detector of a rising loss. It includes the losses of earlier processes.
    """

    def __init__(
        self,
        path: Path | None,
        start_step: int,
        on_record: Callable[[dict[str, Any]], None],
        skips: int = 0,
    ) -> None:
        self._on_record, self._skips, self._skipped = on_record, skips, 0
        self._waiting: deque[tuple[dict[str, Any], list[str], Callable[[], Tensor]]] = deque()
        self._file: _LineFile | None = None
        self.steps_dropped = 0
        self.largest_norm: float | None = None
        self.watch = LossWatch()
        if path is not None:
            lines = []
            for line, step, loss in _lines(path):
                if step > start_step:
                    self.steps_dropped += loss is not None
                    continue
                lines.append(line)
                if loss is not None:
                    self.watch.add(step, loss)
            save_text(path, "".join(lines))
            self._file = _LineFile(path)

    def add(self, record: dict[str, Any]) -> None:
        """Add the record of a step, whose values may be tensors, and write the previous record.

        Raises:
            TrainingError: If loss or gradients of the previous step are not finite.
        """
        tensors = {k: v.detach() for k, v in record.items() if isinstance(v, Tensor)}
        numbers = torch.stack(list(tensors.values())) if tensors else torch.empty(0)
        self._waiting.append((record, list(tensors), fetch(numbers)))
        while len(self._waiting) > 1:
            self._write(*self._waiting.popleft())

    def flush(self) -> None:
        """Write all pending records."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def close(self) -> None:
        """Close the file without writing pending records."""
        if self._file is not None:
            self._file.close()

    def _write(
        self, record: dict[str, Any], names: list[str], numbers: Callable[[], Tensor]
    ) -> None:
        values = record | dict(zip(names, numbers().tolist(), strict=True))
        if is_step := "loss" in values:
            self._require_finite(values)
        if self._file is not None:
            # An fp16 step that was skipped after an overflow has no finite gradient norm.
            written = {
                k: None if v in (math.inf, -math.inf) or v != v else v for k, v in values.items()
            }
            self._file.write(json.dumps(written) + "\n")
            if is_step:
                self._watch(values["step"], values["loss"])
        self._on_record(values)

    def _require_finite(self, values: Mapping[str, Any]) -> None:
        is_skipped = not math.isfinite(values.get("grad_norm", 0))
        if not is_skipped or self._skipped >= self._skips or not math.isfinite(values["loss"]):
            require_finite(values, self._skipped)
        self._skipped = self._skipped + 1 if is_skipped else 0
        norm, largest = values.get("grad_norm", 0), self.largest_norm
        if is_skipped:
            self.largest_norm = math.inf if largest is None else largest
        else:
            self.largest_norm = max(norm, 0 if largest in (None, math.inf) else largest)

    def _watch(self, step: int, loss: float) -> None:
        had_risen = self.watch.risen_at is not None
        self.watch.add(step, loss)
        if self.watch.risen_at is not None and not had_risen:
            warnings.warn(
                f"the loss has risen far above its start by step {step} (more than {_FACTOR:g} "
                f"times the mean of the first {_START} steps): the learning rate may be too high. "
                "The newest checkpoint from before is kept regardless of checkpoints_total_limit",
                stacklevel=2,
            )


class _LineFile:
    """Writer of whole lines. Lines that a full disk rejects are written with the next line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._end = path.stat().st_size
        self._waiting = b""

    def write(self, line: str) -> None:
        data = self._waiting + line.encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            if not self._waiting:
                warnings.warn(
                    f"metrics.jsonl cannot be written: {error.strerror}. Training continues; the "
                    "lines are written when the disk has space",
                    stacklevel=2,
                )
            self._waiting = data
        else:
            self._end += len(data)
            self._waiting = b""

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[tuple[str, int, float | None]]:
    """Read the complete lines of a log, each with its step and, for a training step, its loss.

    An incomplete last line is dropped.

    Warns:
        UserWarning: If another line is damaged. It is dropped too.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    read: list[tuple[str, int, float | None]] = []
    damaged = 0
    for line in lines:
        if not line.endswith("}\n"):
            continue
        try:
            record = json.loads(line)
            loss = None if is_validation(record) else float(record["loss"])
            read.append((line, int(record["step"]), loss))
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        noun = counted(damaged, "line")
        warnings.warn(f"{path.name}: {noun} cannot be read and will be dropped", stacklevel=3)
    return read


class Trackers:
    """Trackers of Accelerate that ``report_to`` configures.

    If a tracker cannot write, training continues without trackers, with one warning.
    """

    def __init__(self, accelerator: Any, enabled: bool) -> None:
        self._accelerator = accelerator
        self._enabled = enabled

    def begin(self, values: Mapping[str, Any]) -> None:
        """Open the trackers and log the settings of the run."""
        if not self._enabled:
            return
        self._accelerator.init_trackers(_PROJECT)
        for tracker in self._accelerator.trackers:
            self._attempt(partial(_store_settings, tracker, values))

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Log the metrics of a step."""
        if self._enabled:
            self._attempt(partial(self._accelerator.log, step_tags(record), step=record["step"]))

    def log_images(self, tag: str, images: Sequence[Image.Image], step: int) -> None:
        """Log images of the same size under a tag."""
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
    """Return the metrics of a record by tag, such as ``train/loss``."""
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
    """Return settings as scalars: lists and mappings are joined, paths reduced to their names."""
    return {name: _plain(value) for name, value in without_paths(config.to_dict()).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in value.items()]
    if isinstance(value, list):
        return " | ".join(str(item) for item in value)
    return "" if value is None else value


def _store_settings(tracker: Any, values: Mapping[str, Any]) -> None:
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(dict(values))
        return
    from torch.utils.tensorboard.summary import hparams

    # The HPARAMS tab shows loss and settings together only if both are in the run's file.
    # Accelerate would create a separate run for the settings.
    for summary in hparams(dict(values), {"train/loss": 0.0}):
        tracker.writer.file_writer.add_summary(summary)
    lines = [f"    {name}: {value}" for name, value in values.items()]
    tracker.writer.add_text("settings", "\n".join(lines))
