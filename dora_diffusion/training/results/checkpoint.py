"""Checkpoints: all that a run needs to resume exactly, beside weights to use at once.

A checkpoint is a folder ``checkpoint-STEP``. It is written whole or not at all, and read back
before any of its predecessors goes.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dora_diffusion import system
from dora_diffusion.config import ConfigError
from dora_diffusion.config.file import PATHS, RELATIVE, resolve_paths
from dora_diffusion.config.paths import relative_paths
from dora_diffusion.formats.files.atomic import DiskFullError, atomic_file
from dora_diffusion.formats.files.runs import CHECKPOINT
from dora_diffusion.numerics.merging import is_finite
from dora_diffusion.training.optimizer import restore_optimizer
from dora_diffusion.training.processes import gather, load

if TYPE_CHECKING:
    from dora_diffusion.training.run import Run

STATE_FILE = "training_state.pt"
FORMAT = 1
"""Version of a checkpoint's state and of ``run.json``; raised when an older one cannot be read."""
_REQUIRED = {
    "step", "config", "contents", "segments", "parameters", "optimizer", "lr_schedule", "sampler",
    "batches", "scaler", "projections", "start", "hooks", "validation", "interim",
}  # fmt: skip
# What else a run writes meanwhile: samples, metrics.
_MARGIN = 2**20

WriteWeights = Callable[[Path], object]


def checkpoints_in(output_dir: Path, after: int = -1) -> list[Path]:
    """The complete checkpoints of a run, those after a step, oldest first."""
    return [path for path in folders_after(output_dir, after) if (path / STATE_FILE).is_file()]


def folders_after(output_dir: Path, step: int) -> list[Path]:
    """Checkpoint folders after a step, oldest first, with those that hold an adapter alone."""
    folders = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in folders if step_of(path) > step), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of ``checkpoint-STEP``; 0 for a folder of another name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
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
                f"{output_dir} contains no checkpoint to resume from (a run with "
                "--checkpointing_steps 0 keeps none); start over with --overwrite_output_dir, or "
                "leave out --resume_from_checkpoint",
                "resume_from_checkpoint",
            )
        return checkpoints[-1]
    places = (Path(name).expanduser(), output_dir / name)
    for path in places:
        if (path / STATE_FILE).is_file():
            return path
    if not any(path.exists() for path in places):
        others = checkpoints_in(output_dir)
        newest = f"; the newest in {output_dir} is {others[-1].name}" if others else ""
        raise ConfigError(f"the checkpoint {name} does not exist{newest}", "resume_from_checkpoint")
    raise ConfigError(
        f"{name} is not a checkpoint of a training run (it has no {STATE_FILE})",
        "resume_from_checkpoint",
    )


def hook_states(run: Run) -> dict[str, Any]:
    """Return the states of a run's hooks by name. All processes call it, outside of `in_use`."""
    return {hook.name: hook.state_dict() for hook in run.step.hooks if hook.name}


def state_of(run: Run, segments: object, step: int) -> dict[str, Any]:
    """Return the state that a run resumes from, on the CPU, but for the states of its hooks.

    All processes of a sharded model call it. The state of the first process is whole.

    Args:
        run: The run.
        segments: The settings that were used, by the step from which on they were.
        step: Number of steps that are done.
    """
    scaler, optimizer = run.accelerator.scaler, run.step.optimizer.state_dict()
    config = run.config.to_dict()
    paths = relative_paths(config, run.config.output_dir)
    tensors = run.weights.tensors()
    return {
        "format": FORMAT,
        "step": step,
        "config": config,
        "paths": {name: path for name, path in paths.items() if path != config[name]},
        "contents": run.dataset.contents(),
        "segments": segments,
        "parameters": {name: gather(tensor) for name, tensor in tensors.items()},
        "optimizer": dict(run.step.parameters.gather_state(optimizer)),
        "lr_schedule": run.step.lr_schedule.state_dict(),
        **run.data_position(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "projections": run.weights.projections(),
        "start": run.weights.start(),
        "probe": run.probe.state_dict(),
        "validation": None if run.validation is None else run.validation.state_dict(),
    }


def read_state(path: Path) -> dict[str, Any]:
    """Read the state that `state_of` returned when a checkpoint was saved.

    Raises:
        ConfigError: If it cannot be read, or has the format of another version.
    """
    try:
        # weights_only: the file holds tensors and plain values, and cannot run code.
        state: dict[str, Any] = torch.load(path / STATE_FILE, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ConfigError(
            f"cannot read the checkpoint {path}: {error}", "resume_from_checkpoint"
        ) from error
    other = "newer" if state.get("format", FORMAT) > FORMAT else "older"
    if other == "newer" or not state.keys() >= _REQUIRED:
        use = f"--pretrained_model_name_or_path {path / 'model'}"
        if not (path / "model").is_dir():
            use = f"--init_adapter {path}"
        raise ConfigError(
            f"the checkpoint {path} is of {'a' if other == 'newer' else 'an'} {other} version of "
            f"dora-diffusion, which this one cannot resume; begin a new run with {use}",
            "resume_from_checkpoint",
        )
    return state | {"config": state["config"] | _moved_paths(state, path.parent)}


def _moved_paths(state: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Files and folders of the settings that moved together with the run's folder."""
    paths = resolve_paths({PATHS: RELATIVE, **state.get("paths", {})}, folder)
    return {n: path for n, path in paths.items() if isinstance(path, str) and Path(path).exists()}


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Restore a run from a state; learning rates and decays stay this run's.

    Raises:
        ConfigError: If it is of other layers.

    Warns:
        UserWarning: If its validation losses are of other photos, and are dropped.
    """
    restore_weights(run, state)
    step, saved = run.step, state["optimizer"]
    own = {**state, "optimizer": step.parameters.own_state(saved)}
    restore_optimizer(step.optimizer, step.lr_schedule, own)
    for hook in step.hooks:
        if hook.name:
            hook.load_state_dict(state["hooks"][hook.name])
    run.sampler.load_state_dict(state["sampler"])
    run.probe.load_state_dict(state.get("probe", {}))
    step.batches.index = int(state["batches"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    validation = run.validation
    if validation and not validation.load_state_dict(state["validation"], state["config"]):
        warnings.warn(
            "other photos or captions are held out than before: the lowest validation loss, and "
            "patience, are counted from here on",
            stacklevel=3,
        )


def restore_weights(run: Run, state: Mapping[str, Any]) -> None:
    """Restore what a state has learned into a run, and nothing else of it.

    Raises:
        ConfigError: If it is of other layers.
    """
    if state["projections"] != run.weights.projections():
        raise ConfigError(
            "the checkpoint's random projections are not those that this version draws; "
            "resume it with the version that wrote it",
            "resume_from_checkpoint",
        )
    saved, tensors = state["parameters"], run.weights.tensors()
    shapes, own = ({k: tuple(v.shape) for k, v in of.items()} for of in (saved, tensors))
    if shapes != own:
        raise ConfigError(
            "the checkpoint was trained in other layers or shapes than this run's",
            "resume_from_checkpoint",
        )
    load(saved, tensors)
    run.weights.restore_start(state["start"])


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
        self._is_known = False  # The interim checkpoint was announced: it was resumed from.
        self.newest: Path | None = None
        self.best: Path | None = None
        self.last_step: int | None = None
        self._removed = list[str]()
        self._result_alone: Path | None = None
        self._clock = clock
        self._begun = clock()

    def is_due(self, step: int) -> bool:
        """Return whether a step has a checkpoint that stays."""
        return bool(self.every_steps) and step % self.every_steps == 0

    def is_overdue(self) -> bool:
        """Return whether the last checkpoint, or the run's start, is too many minutes ago."""
        return bool(self.every_seconds) and self._clock() - self._begun >= self.every_seconds

    def resume_from(self, path: Path, *, interim: bool, best: int | None = None) -> None:
        """Count from a checkpoint of an earlier process, whose best one is of a step."""
        self.newest = path
        self.best = None if best is None else self.output_dir / f"checkpoint-{best}"
        if interim and path.parent.resolve() == self.output_dir.resolve():
            self.interim = path
            self._is_known = True

    def take_removed(self) -> tuple[str, ...]:
        """Names of the folders that were removed since the last call, and were announced before."""
        removed = tuple(self._removed)
        self._removed.clear()
        return removed

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        write_weights: WriteWeights,
        *,
        interim: bool = False,
        is_best: bool = False,
        is_stable: Callable[[int], bool] = lambda step: True,
    ) -> Path | None:
        """Save a checkpoint; where it cannot be written, its result alone, with a warning.

        Earlier ones go only when the new one was read back, and its numbers are finite. Beside the
        limit stay the newest of those at whose step the loss ``is_stable``, and the best one: the
        last that was saved as such. One that was saved for that alone goes when another is best.

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
            self._remove(self.interim, was_announced=self._is_known)
        self._is_known = False
        self.interim, self.newest = (path if interim else None), path
        if is_best:
            if self.best not in (None, path) and not self.is_due(step_of(self.best)):
                self._remove(self.best)
            self.best = path
        if self.limit and not interim:
            kept = (self.newest_stable(is_stable), self.best)
            for old in checkpoints_in(self.output_dir)[: -self.limit]:
                if old not in kept:
                    self._remove(old)
        return path

    def _remove(self, folder: Path, *, was_announced: bool = True) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if was_announced:
            self._removed.append(folder.name)

    def newest_stable(self, is_stable: Callable[[int], bool]) -> Path | None:
        """The newest checkpoint of a step at which nothing spoke of a rising loss."""
        found = reversed(checkpoints_in(self.output_dir))
        return next((path for path in found if is_stable(step_of(path))), None)

    def _save_alone(self, step: int, write_weights: WriteWeights, cause: OSError) -> None:
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
        removed = ""
        if self._result_alone is not None:  # The newest is enough, where room is scarce.
            shutil.rmtree(self._result_alone, ignore_errors=True)
            removed = f"; {self._result_alone.name} was removed for it"
        self._result_alone = folder
        warnings.warn(
            f"no checkpoint at step {step}: {reason}; only the {self.noun} was saved, "
            f"{folder.name}, which generates and cannot resume{removed}. Training continues; free "
            f"some space ({before})",
            stacklevel=2,
        )


def _write(output_dir: Path, step: int, state: dict[str, Any], write_weights: WriteWeights) -> Path:
    """Write ``checkpoint-STEP`` and read it back; earlier ones are untouched if that fails.

    Raises:
        OSError: If there is no room, or it cannot be read.
        ValueError: If a number is not finite.
    """
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
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # Of the writer's own state, when the disk refuses.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
        try:
            options: dict[str, Any] = {"weights_only": True, "map_location": "cpu", "mmap": True}
            written = torch.load(folder / STATE_FILE, **options)
        except Exception as error:
            raise OSError(errno.EIO, f"it cannot be read back: {error}") from error
        if not all(is_finite(t) for t in _tensors_in(written) if t.is_floating_point()):
            raise ValueError("its state holds numbers that are not finite")
        del written  # Its file is mapped, and could not be moved everywhere.
    return output_dir / f"checkpoint-{step}"


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
