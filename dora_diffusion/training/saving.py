"""When a run saves a checkpoint, and what becomes of it where the disk is full."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.training.checkpoint import drop_oldest, save_adapter_alone, save_checkpoint

Clock = Callable[[], float]


class CheckpointSaver:
    """Checkpoints every so many steps, and in between every so many minutes.

    Those in between are for a crash only: each is dropped when the next checkpoint is complete.

    Args:
        output_dir: The run's folder.
        every_steps: Steps between checkpoints that stay; 0 saves none, nor any in between.
        every_minutes: Minutes after which one in between is due; 0 saves none.
        limit: Checkpoints to keep; None keeps all.
        clock: Seconds, from anywhere.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every_steps: int,
        every_minutes: float,
        limit: int | None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.output_dir = output_dir
        self.every_steps = every_steps
        self.every_seconds = 60 * every_minutes if every_steps else 0.0
        self.limit = limit
        self.interim: Path | None = None
        self.newest: Path | None = None
        self._clock = clock
        self._begun = clock()

    def is_due(self, step: int) -> bool:
        """Whether a step has a checkpoint that stays."""
        return bool(self.every_steps) and step % self.every_steps == 0

    def is_overdue(self) -> bool:
        """Whether the last one, or the run's start, is more minutes ago than may be lost."""
        return bool(self.every_seconds) and self._clock() - self._begun >= self.every_seconds

    def resume_from(self, path: Path, *, interim: bool) -> None:
        """Count from a checkpoint of an earlier process."""
        self.newest = path
        if interim and path.parent.resolve() == self.output_dir.resolve():
            self.interim = path

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        write_adapter: Callable[[Path], object],
        *,
        interim: bool = False,
    ) -> Path | None:
        """Save a checkpoint; where it cannot be written, the small adapter alone, with a warning.

        Returns:
            The checkpoint, or None: training goes on without it.
        """
        self._begun = self._clock()
        try:
            state = {**state, "interim": interim}
            path = save_checkpoint(self.output_dir, step, state, write_adapter)
        except OSError as error:
            self._save_adapter(step, write_adapter, error)
            return None
        if self.interim is not None and self.interim != path:
            shutil.rmtree(self.interim, ignore_errors=True)
        self.interim, self.newest = (path if interim else None), path
        if self.limit and not interim:
            drop_oldest(self.output_dir, self.limit)
        return path

    def _save_adapter(
        self, step: int, write_adapter: Callable[[Path], object], cause: OSError
    ) -> None:
        before = f"the newest is {self.newest.name}" if self.newest else "there is none before it"
        try:
            folder = save_adapter_alone(self.output_dir, step, write_adapter)
            saved = f"only the adapter was saved, {folder.name}, which generates and cannot resume"
        except OSError:
            saved = "not even the adapter was saved"
        warnings.warn(
            f"no checkpoint at step {step}: {cause.strerror or cause}; {saved}. Training goes on; "
            f"free some space ({before})",
            stacklevel=2,
        )
