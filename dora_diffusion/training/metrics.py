"""One JSON line per step, written when its numbers have arrived from the device."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.models.transfer import fetch


class TrainingError(RuntimeError):
    """A run that cannot continue, with its step and what to do."""


class MetricsLog:
    """Steps' numbers, read from the device one step late, so that logging does not wait for it.

    Args:
        path: The ``metrics.jsonl`` to append to; None writes nothing.
        start_step: Lines of later steps, left by a run that is now resumed from here, are dropped.
        on_record: Called with each step's record.
    """

    def __init__(
        self, path: Path | None, start_step: int, on_record: Callable[[dict[str, Any]], None]
    ) -> None:
        self._on_record = on_record
        self._waiting: deque[tuple[dict[str, Any], list[str], Callable[[], Tensor]]] = deque()
        self._file: _LineFile | None = None
        self.steps_dropped = 0
        if path is not None:
            lines = _lines(path)
            kept = [line for line in lines if json.loads(line)["step"] <= start_step]
            self.steps_dropped = len(lines) - len(kept)
            save_text(path, "".join(kept))
            self._file = _LineFile(path)

    def add(self, record: dict[str, Any]) -> None:
        """Take a step's record, whose values may be tensors, and write the one before it.

        Raises:
            TrainingError: If the loss of the step before is not finite.
        """
        tensors = {k: v.detach() for k, v in record.items() if isinstance(v, Tensor)}
        numbers = torch.stack(list(tensors.values())) if tensors else torch.empty(0)
        self._waiting.append((record, list(tensors), fetch(numbers)))
        while len(self._waiting) > 1:
            self._write(*self._waiting.popleft())

    def flush(self) -> None:
        """Write everything that waits."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def close(self) -> None:
        """Close the file; what waits is dropped."""
        if self._file is not None:
            self._file.close()

    def _write(
        self, record: dict[str, Any], names: list[str], numbers: Callable[[], Tensor]
    ) -> None:
        values = record | dict(zip(names, numbers().tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"the loss is {values['loss']} at step {values['step']}; lower the learning rate "
                "(or, if it trains in fp16, choose --mixed_precision bf16)"
            )
        if self._file is not None:
            # An fp16 step that overflowed, and was skipped, has no norm of its gradients.
            written = {
                k: None if v in (math.inf, -math.inf) or v != v else v for k, v in values.items()
            }
            self._file.write(json.dumps(written) + "\n")
        self._on_record(values)


class _LineFile:
    """Lines at the end of a file, whole: what a full disk refuses waits for the next line."""

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
                    f"metrics.jsonl cannot be written: {error.strerror}; training continues, and "
                    "its lines are written when there is room",
                    stacklevel=2,
                )
            self._waiting = data
        else:
            self._end += len(data)
            self._waiting = b""

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Complete lines of a log; a half-written last one is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n")]
