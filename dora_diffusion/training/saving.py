"""When a run saves a checkpoint, and what becomes of it where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dora_diffusion import system
from dora_diffusion.formats.files.atomic import DiskFullError, atomic_file
from dora_diffusion.training.checkpoint import STATE_FILE, checkpoints_in

# What else a run writes meanwhile: samples, metrics.
_MARGIN = 2**20


class CheckpointSaver:
    """Checkpoints every so many steps, and in between every so many minutes.

    Those in between are for a crash only: each is dropped when the next checkpoint is complete.

    Args:
        output_dir: The run's folder.
        every_steps: Steps between checkpoints that stay; 0 saves none, nor any in between.
        every_minutes: Minutes after which one in between is due; 0 saves none.
        limit: Checkpoints to keep; None keeps all.
        noun: What is saved beside the state: ``"adapter"`` or ``"model"``.
        clock: Seconds, from anywhere.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every_steps: int,
        every_minutes: float,
        limit: int | None,
        noun: str = "adapter",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.output_dir = output_dir
        self.every_steps = every_steps
        self.every_seconds = 60 * every_minutes if every_steps else 0.0
        self.limit = limit
        self.noun = noun
        self.interim: Path | None = None
        self.newest: Path | None = None
        self.last_step: int | None = None
        self._result_alone: Path | None = None
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
        write_weights: Callable[[Path], object],
        *,
        interim: bool = False,
    ) -> Path | None:
        """Save a checkpoint; where it cannot be written, its result alone, with a warning.

        Returns:
            The checkpoint, or None: training continues without it.
        """
        self._begun, self.last_step = self._clock(), step
        try:
            path = _write(self.output_dir, step, {**state, "interim": interim}, write_weights)
        except OSError as error:
            self._save_alone(step, write_weights, error)
            return None
        if self.interim is not None and self.interim != path:
            shutil.rmtree(self.interim, ignore_errors=True)
        self.interim, self.newest = (path if interim else None), path
        if self.limit and not interim:
            for old in checkpoints_in(self.output_dir)[: -self.limit]:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def _save_alone(
        self, step: int, write_weights: Callable[[Path], object], cause: OSError
    ) -> None:
        before = f"the newest is {self.newest.name}" if self.newest else "there is none before it"
        try:
            with _new_folder(self.output_dir, step) as folder:
                write_weights(folder)
            folder = self.output_dir / f"checkpoint-{step}"
            saved = (
                f"only the {self.noun} was saved, {folder.name}, which generates and cannot resume"
            )
            if self._result_alone is not None:  # The newest is enough, where room is scarce.
                shutil.rmtree(self._result_alone, ignore_errors=True)
            self._result_alone = folder
        except OSError:
            saved = f"not even the {self.noun} was saved"
        warnings.warn(
            f"no checkpoint at step {step}: {cause.strerror or cause}; {saved}. Training continues"
            f"; free some space ({before})",
            stacklevel=2,
        )


def _write(
    output_dir: Path, step: int, state: dict[str, Any], write_weights: Callable[[Path], object]
) -> Path:
    """Write ``checkpoint-STEP``; earlier ones are untouched if there is no room."""
    parameters = sum(value.nbytes for value in state["parameters"].values())
    size = _bytes_in(state) + 2 * parameters + _MARGIN
    free = shutil.disk_usage(output_dir).free
    if free < size:
        raise DiskFullError(
            errno.ENOSPC,
            f"it takes {size / 2**20:.1f} MB, and the disk has {free / 2**20:.1f} MB free",
        )
    with _new_folder(output_dir, step) as folder:
        write_weights(folder)
        # Into a file that is open: torch, given a name, hides why a write failed.
        with atomic_file(folder / STATE_FILE) as temporary, temporary.open("wb") as file:
            _save_state(state, file)
    return output_dir / f"checkpoint-{step}"


def _save_state(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write with torch, whose writer may complain of its own state when the disk refuses."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _bytes_in(state: Any) -> int:
    """Bytes of the tensors in plain containers."""
    if isinstance(state, Mapping):
        return sum(_bytes_in(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(_bytes_in(value) for value in state)
    return state.nbytes if isinstance(state, torch.Tensor) else 0


@contextlib.contextmanager
def _new_folder(output_dir: Path, step: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``checkpoint-STEP`` if the block succeeds."""
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    system.replace(temporary, final)
