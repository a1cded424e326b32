"""Checkpoints: the complete state of a run, for exact resuming, with weights for immediate use.

A checkpoint is a folder ``checkpoint-STEP``. It is written atomically, and verified before an
earlier checkpoint is removed.
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
from dora_diffusion.config.derived import relative_paths
from dora_diffusion.config.file import PATHS, RELATIVE, resolve_paths
from dora_diffusion.formats.files.atomic import DiskFullError, atomic_file
from dora_diffusion.formats.files.runs import CHECKPOINT
from dora_diffusion.numerics.merging import is_finite
from dora_diffusion.training.features.outside import digests_of
from dora_diffusion.training.optimizer import restore_optimizer
from dora_diffusion.training.processes import gather, load

if TYPE_CHECKING:
    from dora_diffusion.training.run import Run

STATE_FILE = "training_state.pt"
FORMAT = 1
"""Format version of checkpoints and ``run.json``; increased when old files cannot be read."""
_REQUIRED = {
    "step", "config", "contents", "segments", "parameters", "optimizer", "lr_schedule", "sampler",
    "batches", "scaler", "projections", "start", "validation", "interim",
}  # fmt: skip
# Space for samples and metrics.
_MARGIN = 2**20

WriteWeights = Callable[[Path], object]


def checkpoints_in(output_dir: Path, after: int = -1) -> list[Path]:
    """Return the complete checkpoints of a run after a step, oldest first."""
    return [path for path in folders_after(output_dir, after) if (path / STATE_FILE).is_file()]


def folders_after(output_dir: Path, step: int) -> list[Path]:
    """Return the checkpoint folders after a step, oldest first. They may be adapters only."""
    folders = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in folders if step_of(path) > step), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a folder ``checkpoint-STEP``; 0 for another name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """Find the checkpoint that ``resume_from_checkpoint`` names.

    Raises:
        ConfigError: If it does not exist.
    """
    if name == "latest":
        checkpoints = checkpoints_in(output_dir)
        if not checkpoints:
            raise ConfigError(
                f"{output_dir} contains no checkpoint to resume from (a run with "
                "--checkpointing_steps 0 keeps none); start over with --overwrite_output_dir, or "
                "remove --resume_from_checkpoint",
                "resume_from_checkpoint",
            )
        return checkpoints[-1]
    candidates = (Path(name).expanduser(), output_dir / name)
    for path in candidates:
        if (path / STATE_FILE).is_file():
            return path
    if not any(path.exists() for path in candidates):
        existing = checkpoints_in(output_dir)
        newest = f"; the newest in {output_dir} is {existing[-1].name}" if existing else ""
        raise ConfigError(f"the checkpoint {name} does not exist{newest}", "resume_from_checkpoint")
    raise ConfigError(
        f"{name} is not a checkpoint of a training run (it has no {STATE_FILE})",
        "resume_from_checkpoint",
    )


def hook_states(run: Run) -> dict[str, Any]:
    """Return the states of the hooks by name. All processes must call it, outside `in_use`."""
    return {hook.name: hook.state_dict() for hook in run.step.hooks if hook.name}


def state_of(run: Run, segments: object, step: int) -> dict[str, Any]:
    """Return the state of a run for resuming, on the CPU, without the states of its hooks.

    All processes of a sharded model must call this function. The first one gets the whole state.

    Args:
        run: The run.
        segments: Settings of the steps so far (`results.resume.segment`).
        step: Number of completed steps.
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
        "initial": run.initial,
        "features": digests_of(run.config),
        "validation": None if run.validation is None else run.validation.state_dict(),
    }


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint (`state_of`).

    Raises:
        ConfigError: If it cannot be read, or another version has written it.
    """
    try:
        # weights_only: the file contains tensors and plain values and cannot execute code.
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
            f"the checkpoint {path} is from {'a' if other == 'newer' else 'an'} {other} version of "
            f"dora-diffusion and cannot be resumed; start a new run with {use}",
            "resume_from_checkpoint",
        )
    return state | {"config": state["config"] | _moved_paths(state, path.parent)}


def _moved_paths(state: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the paths in the settings that were moved together with the run's folder."""
    paths = resolve_paths({PATHS: RELATIVE, **state.get("paths", {})}, folder)
    return {n: path for n, path in paths.items() if isinstance(path, str) and Path(path).exists()}


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Restore a run from a state, except for learning rates and weight decays.

    Raises:
        ConfigError: If the state belongs to other layers.

    Warns:
        UserWarning: If the validation losses belong to other photos and are dropped.
    """
    restore_weights(run, state)
    step, saved = run.step, state["optimizer"]
    sharded = {**state, "optimizer": step.parameters.own_state(saved)}
    restore_optimizer(step.optimizer, step.lr_schedule, sharded)
    for hook in step.hooks:
        if hook.name:
            hook.load_state_dict(state[hook.name])
    run.sampler.load_state_dict(state["sampler"])
    run.initial = state.get("initial", "")
    step.batches.index = int(state["batches"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    validation = run.validation
    if validation and not validation.load_state_dict(state["validation"], state["config"]):
        warnings.warn(
            "the held-out photos or captions have changed: the lowest validation loss is counted "
            "from this step",
            stacklevel=3,
        )


def restore_weights(run: Run, state: Mapping[str, Any]) -> None:
    """Restore only the trained weights of a state.

    Raises:
        ConfigError: If the state belongs to other layers.
    """
    if state["projections"] != run.weights.projections():
        raise ConfigError(
            "the checkpoint has other random projections than this version draws; resume it with "
            "the version that wrote it",
            "resume_from_checkpoint",
        )
    saved, tensors = state["parameters"], run.weights.tensors()
    old, new = ({k: tuple(v.shape) for k, v in of.items()} for of in (saved, tensors))
    if old != new:
        raise ConfigError(
            "the checkpoint has other layers or shapes than this run; restore the settings of its "
            "run",
            "resume_from_checkpoint",
        )
    load(saved, tensors)
    run.weights.restore_start(state["start"])


class CheckpointSaver:
    """Saver of regular checkpoints by steps, and of temporary ones by minutes.

    Temporary checkpoints are for crashes. Each is removed when the next checkpoint is complete.

    Args:
        output_dir: Output folder of the run.
        every_steps: Steps between regular checkpoints; 0: no checkpoints, also no temporary ones.
        every_minutes: Minutes after which a temporary checkpoint is due; 0: none.
        limit: Number of checkpoints to keep; None: all.
        noun: Kind of the saved weights: ``"adapter"`` or ``"model"``.
        clock: Monotonic clock in seconds.
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
        self._is_known = False  # The run was resumed from the interim checkpoint.
        self.newest: Path | None = None
        self.best: Path | None = None
        self.last_step: int | None = None
        self._removed = list[str]()
        self._result_alone: Path | None = None
        self._clock = clock
        self._begun = clock()

    def is_due(self, step: int) -> bool:
        """Return whether a regular checkpoint is due at a step."""
        return bool(self.every_steps) and step % self.every_steps == 0

    def is_overdue(self) -> bool:
        """Return whether a temporary checkpoint is due."""
        return bool(self.every_seconds) and self._clock() - self._begun >= self.every_seconds

    def resume_from(self, path: Path, *, interim: bool, best: int | None = None) -> None:
        """Continue from a checkpoint of an earlier process, with its best step."""
        self.newest = path
        self.best = None if best is None else self.output_dir / f"checkpoint-{best}"
        if interim and path.parent.resolve() == self.output_dir.resolve():
            self.interim = path
            self._is_known = True

    def take_removed(self) -> tuple[str, ...]:
        """Return the names of announced checkpoints that were removed since the last call."""
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
        """Save a checkpoint, or only its weights, with a warning, if it cannot be written.

        Earlier checkpoints are removed only after the new one has been verified. In addition to the
        limit, two checkpoints are kept: the newest one at whose step the loss ``is_stable``, and
        the last one that was saved with ``is_best``. A checkpoint that was saved only as the best
        one is removed when another step is better.

        Returns:
            The checkpoint; None if only its weights were saved.

        Raises:
            OSError: If the weights cannot be written either.
            ValueError: If state or weights are not finite.
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
            protected = (self.newest_stable(is_stable), self.best)
            for old in checkpoints_in(self.output_dir)[: -self.limit]:
                if old not in protected:
                    self._remove(old)
        return path

    def _remove(self, folder: Path, *, was_announced: bool = True) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if was_announced:
            self._removed.append(folder.name)

    def newest_stable(self, is_stable: Callable[[int], bool]) -> Path | None:
        """Return the newest checkpoint at whose step the loss was stable."""
        newest_first = reversed(checkpoints_in(self.output_dir))
        return next((path for path in newest_first if is_stable(step_of(path))), None)

    def _save_alone(self, step: int, write_weights: WriteWeights, cause: OSError) -> None:
        before = f"the newest is {self.newest.name}" if self.newest else "none was saved before"
        reason = cause.strerror or cause
        try:
            with _new_folder(self.output_dir, step) as folder:
                write_weights(folder)
        except OSError as error:
            kind = DiskFullError if isinstance(cause, DiskFullError) else OSError
            text = (
                f"nothing can be saved at step {step}: {reason}; the run stops, since further "
                f"steps would be lost: free some space, and resume ({before})"
            )
            raise kind(cause.errno, text) from error
        folder = self.output_dir / f"checkpoint-{step}"
        removed = ""
        if self._result_alone is not None:  # Keep only the newest one on a full disk.
            shutil.rmtree(self._result_alone, ignore_errors=True)
            removed = f"; {self._result_alone.name} was removed to make room"
        self._result_alone = folder
        warnings.warn(
            f"no checkpoint at step {step}: {reason}; only the {self.noun} was saved, "
            f"{folder.name}, which can generate but not resume{removed}. Training continues; free "
            f"some space ({before})",
            stacklevel=2,
        )


def _write(output_dir: Path, step: int, state: dict[str, Any], write_weights: WriteWeights) -> Path:
    """Write and verify ``checkpoint-STEP``. A failure leaves existing folders unchanged.

    Raises:
        OSError: If the disk has no space, or the checkpoint cannot be read back.
        ValueError: If a value is not finite.
    """
    parameters = sum(value.nbytes for value in state["parameters"].values())
    size = sum(tensor.nbytes for tensor in _tensors_in(state)) + 2 * parameters + _MARGIN
    free = shutil.disk_usage(output_dir).free
    if free < size:
        raise DiskFullError(
            errno.ENOSPC,
            f"it needs {size / 2**20:.1f} MB, but the disk has {free / 2**20:.1f} MB free",
        )
    with _new_folder(output_dir, step) as folder:
        write_weights(folder)
        # Written to an open file: with a file name, torch hides the cause of a failed write.
        with atomic_file(folder / STATE_FILE) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # On a full disk, torch's writer raises an error about its internal state.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
        try:
            options: dict[str, Any] = {"weights_only": True, "map_location": "cpu", "mmap": True}
            written = torch.load(folder / STATE_FILE, **options)
        except Exception as error:
            raise OSError(errno.EIO, f"it cannot be read back: {error}") from error
        if not all(is_finite(t) for t in _tensors_in(written) if t.is_floating_point()):
            raise ValueError("its state contains values that are not finite")
        del written  # Some systems cannot move a file that is memory-mapped.
    return output_dir / f"checkpoint-{step}"


def _tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
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
