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
from dora_diffusion.merge import is_finite
from dora_diffusion.training.checkpoint import STATE_FILE, checkpoints_in, step_of

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
        is_calm: Callable[[int], bool] = lambda step: True,
    ) -> Path | None:
        """Save a checkpoint; where it cannot be written, its result alone, with a warning.

        Earlier ones go only when the new one was read back, and its numbers are finite; the newest
        of those at whose step the loss ``is_calm`` stays, beside the limit.

        Returns:
            The checkpoint, or None: training continues without it.

        Raises:
            OSError: If its result cannot be written either.
            ValueError: If its numbers are not finite, or ``write_weights`` says so of its own.
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
            calm = self.newest_calm(is_calm)
            for old in checkpoints_in(self.output_dir)[: -self.limit]:
                if old != calm:
                    shutil.rmtree(old, ignore_errors=True)
        return path

    def newest_calm(self, is_calm: Callable[[int], bool]) -> Path | None:
        """The newest checkpoint of a step at which nothing spoke of a rising loss."""
        found = reversed(checkpoints_in(self.output_dir))
        return next((path for path in found if is_calm(step_of(path))), None)

    def _save_alone(
        self, step: int, write_weights: Callable[[Path], object], cause: OSError
    ) -> None:
        before = f"the newest is {self.newest.name}" if self.newest else "there is none before it"
        reason = cause.strerror or cause
        try:
            with _new_folder(self.output_dir, step) as folder:
                write_weights(folder)
        except OSError as error:
            kind = DiskFullError if isinstance(cause, DiskFullError) else OSError
            text = (
                f"nothing can be saved at step {step}: {reason}; the run stops, since what it "
                f"would learn from here on would be lost: free some space, and resume ({before})"
            )
            raise kind(cause.errno, text) from error
        folder = self.output_dir / f"checkpoint-{step}"
        if self._result_alone is not None:  # The newest is enough, where room is scarce.
            shutil.rmtree(self._result_alone, ignore_errors=True)
        self._result_alone = folder
        warnings.warn(
            f"no checkpoint at step {step}: {reason}; only the {self.noun} was saved, "
            f"{folder.name}, which generates and cannot resume. Training continues; free some "
            f"space ({before})",
            stacklevel=2,
        )


def _write(
    output_dir: Path, step: int, state: dict[str, Any], write_weights: Callable[[Path], object]
) -> Path:
    """Write ``checkpoint-STEP``; earlier ones are untouched if there is no room."""
    parameters = sum(value.nbytes for value in state["parameters"].values())
    size = sum(tensor.nbytes for tensor in _tensors_in(state)) + 2 * parameters + _MARGIN
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
        _read_back(folder / STATE_FILE)
    return output_dir / f"checkpoint-{step}"


def _read_back(file: Path) -> None:
    """See that a state can be read, and that its numbers are finite.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a number is not finite.
    """
    try:
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise OSError(errno.EIO, f"it cannot be read back: {error}") from error
    if not all(is_finite(t) for t in _tensors_in(state) if t.is_floating_point()):
        raise ValueError("its state holds numbers that are not finite")


def _save_state(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write with torch, whose writer may complain of its own state when the disk refuses."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """The tensors in plain containers."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors_in(value)


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
