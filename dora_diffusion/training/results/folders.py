"""Checks of a run's output folder, and a lock for exclusive use by one run."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.prior import has_class_images
from dora_diffusion.config.train import photo_folders
from dora_diffusion.formats.adapter.embeddings import EMBEDDINGS, embeddings_of
from dora_diffusion.formats.files.runs import (
    ADAPTER_FILES,
    PIPELINE_NAME,
    REQUESTS,
    pipeline_in,
)
from dora_diffusion.training.results.checkpoint import (
    checkpoints_in,
    find_checkpoint,
    folders_after,
)

LOCK_NAME = ".run.lock"
METRICS_NAME, RECORD_NAME = "metrics.jsonl", "run.json"
# Prefix of temporary folders in which a result is written and verified.
UNFINISHED = ".result-"
# Files of a run with common names, which a user may have in the folder for another purpose.
_COMMON_NAMES = ("README.md", "config.yaml", RECORD_NAME)
# Sub-folders that a run writes to and deletes from.
FEATURES = "features"
"""Folder of the copies of features from outside."""
_OWN_FOLDERS = ("samples", "class_images", FEATURES, EMBEDDINGS, PIPELINE_NAME)
_SAMPLE = re.compile(r"(base|adapted|base_above_adapted|step-\d+)\.png")


@contextlib.contextmanager
def output_folder(config: TrainConfig) -> Iterator[Path]:
    """Create ``output_dir``, and lock it inside the block.

    The lock is held by the operating system, which releases it whenever the process ends. The lock
    file is not deleted, since two other processes could then lock different files of that name.

    Raises:
        ConfigError: If the folder cannot be written to, contains files of the user, is in use by
            another run, or holds a result that the settings do not overwrite.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(f"cannot create output_dir {folder}: {reason}", "output_dir") from error
    with locked(folder, f"output_dir {folder}"):
        _check_contents(config, folder)
        yield folder


@contextlib.contextmanager
def locked(folder: Path, label: str) -> Iterator[None]:
    """Lock a folder inside the block, if its file system supports locks.

    Raises:
        ConfigError: If another run holds the lock, or the lock file cannot be written.

    Warns:
        UserWarning: If the file system does not support locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another run is writing to {label}; wait until it has ended, or choose another",
            label.split()[0],
        ) from error
    except PermissionError as error:
        raise ConfigError(f"cannot write to {label}: {error.strerror}", label.split()[0]) from error
    except (OSError, NotImplementedError):
        warnings.warn(
            f"the file system of {label} does not support locks: make sure that no other run "
            "writes there",
            stacklevel=3,
        )
    try:
        yield
    finally:
        lock.release()


def check_folders(config: TrainConfig) -> None:
    """Check that the run does not write among photos, class images or files of a model.

    Photos may be in a sub-folder of ``output_dir`` to which no run writes.

    Raises:
        ConfigError: If two settings name the same folder, or one inside the other.
    """
    output = Path(config.output_dir).resolve()
    for subject in config.subjects:
        _check_subject_folders(subject, output)
    start = Path(config.init_adapter or "").expanduser()
    if config.init_adapter and start.exists() and not config.resume_from_checkpoint:
        _apart("init_adapter", start.resolve(), "output_dir", output)
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        model = _folder(getattr(config, name))
        if model is not None:
            _apart("output_dir", output, name, model)


def _check_subject_folders(config: TrainConfig, output: Path) -> None:
    photos = _folder(config.instance_data_dir)
    for setting, name in photo_folders(config).items():
        if (folder := _folder(name)) is None:
            continue
        _apart("output_dir", output, setting, folder)
        checkpoints = (path.name for path in output.glob("checkpoint-*"))
        for name in (*_OWN_FOLDERS, config.logging_dir, *checkpoints):
            _apart(setting, folder, f"the run's {name},", output / name)
    folder = _folder(config.class_data_dir) if has_class_images(config) else None
    if folder is not None and folder == photos:
        raise ConfigError(
            f"class_data_dir is the folder of the subject's photos, {folder}, but class images "
            "show other members of the class; choose another folder, or remove it",
            "class_data_dir",
        )
    if folder in (output, output / "samples", output / config.logging_dir):
        raise ConfigError(
            f"the run writes its own files to class_data_dir {folder}; choose another folder, or "
            "remove it",
            "class_data_dir",
        )


def _folder(name: str | None) -> Path | None:
    """Return an existing local folder; None for anything else, such as a hub id or a file."""
    path = Path(name or "").expanduser()
    return path.resolve() if name and path.is_dir() else None


def _apart(inner_name: str, inner: Path, outer_name: str, outer: Path) -> None:
    """Check that one folder is not the other and not inside it."""
    if inner == outer:
        raise ConfigError(
            f"{inner_name} and {outer_name} are the same folder, {inner}; choose another for one "
            "of them",
            inner_name,
        )
    if outer in inner.parents:
        raise ConfigError(
            f"{inner_name} {inner} is inside {outer_name} {outer}; choose another folder",
            inner_name,
        )


def _check_contents(config: TrainConfig, folder: Path) -> None:
    """Check that a run does not overwrite another result or files of the user by accident."""
    if config.resume_from_checkpoint:
        find_checkpoint(config.resume_from_checkpoint, folder)  # before the model is loaded
    if config.resume_from_checkpoint or config.overwrite_output_dir:
        return
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        raise ConfigError(
            f"output_dir {folder} already contains checkpoints up to {checkpoints[-1].name}; "
            "choose another, resume with --resume_from_checkpoint latest (and a larger "
            "--max_train_steps, if it has ended), or start over with --overwrite_output_dir",
            "output_dir",
        )
    if holds_result(folder) or folders_after(folder, -1):
        raise ConfigError(
            f"output_dir {folder} already contains a trained adapter or model, but no checkpoint "
            "to resume from (a run with --checkpointing_steps 0 keeps none); choose another, or "
            "start over with --overwrite_output_dir",
            "output_dir",
        )
    foreign = [name for name in _COMMON_NAMES if (folder / name).exists()]
    if foreign and not (folder / METRICS_NAME).exists():
        raise ConfigError(
            f"output_dir {folder} contains {' and '.join(foreign)}, which no run has written and "
            "this run would replace; choose another output_dir, or replace with "
            "--overwrite_output_dir",
            "output_dir",
        )


def holds_result(folder: Path) -> bool:
    """Return whether a folder contains the adapter or model of a completed run."""
    return any(folder.glob("*.safetensors")) or (folder / PIPELINE_NAME).exists()


def clear_folder(folder: Path, step: int) -> None:
    """Remove files of an earlier run after a step, so that they do not mix with the new run's."""
    for name in REQUESTS:
        (folder / name).unlink(missing_ok=True)
    unfinished = [*folder.glob(".checkpoint-*.tmp"), *folder.glob(f"{UNFINISHED}*")]
    for old in [*folders_after(folder, step), *unfinished]:
        shutil.rmtree(old, ignore_errors=True)
    adapters = [folder / name for name in ADAPTER_FILES]
    model = folder / PIPELINE_NAME
    if step == 0 and (pipeline_in(model) or any(adapter.is_file() for adapter in adapters)):
        samples = [p for p in folder.glob("samples/*.png") if _SAMPLE.fullmatch(p.name)]
        if pipeline_in(model):
            shutil.rmtree(model, ignore_errors=True)
        embeddings = [path for adapter in adapters for path in embeddings_of(adapter)]
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        files = (*embeddings, *adapters, *samples)
        for path in (*files, model.with_suffix(".safetensors"), folder / "README.md"):
            path.unlink(missing_ok=True)
