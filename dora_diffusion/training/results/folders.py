"""The run's folder: that it is not one of the user's own, and that one run at a time has it."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from dora_diffusion.config import ConfigError, TrainConfig
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
# How the names of folders begin in which a result is written, and read back.
UNFINISHED = ".result-"
# What a run writes at the top of its folder, and which somebody may have a file of their own as.
_COMMON_NAMES = ("README.md", "config.yaml", RECORD_NAME)
# Sub-folders that a run writes to and deletes from.
_OWN_FOLDERS = ("samples", "class_images", EMBEDDINGS, PIPELINE_NAME)
_SAMPLE = re.compile(r"(base|adapted|base_above_adapted|step-\d+)\.png")


@contextlib.contextmanager
def output_folder(config: TrainConfig) -> Iterator[Path]:
    """Check and make ``output_dir``, and hold its lock inside the block.

    The lock is the operating system's: it ends with this process, however that happens. Its file
    stays, since deleting it would let two others each hold one of that name.

    Raises:
        ConfigError: If the folder cannot be written to, is one of the user's own, is in use by
            another run, or holds a result that was not asked to be replaced.
    """
    folder = Path(config.output_dir)
    check_folders(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(f"cannot make output_dir {folder}: {reason}", "output_dir") from error
    with locked(folder, f"output_dir {folder}"):
        _check_contents(config, folder)
        yield folder


@contextlib.contextmanager
def locked(folder: Path, shown: str) -> Iterator[None]:
    """Hold a folder's lock inside the block, as far as its disk has locks.

    Raises:
        ConfigError: If another run holds it, or the lock's file cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another run is writing to {shown}; wait until it has ended, or choose another",
            shown.split()[0],
        ) from error
    except PermissionError as error:
        raise ConfigError(f"cannot write to {shown}: {error.strerror}", shown.split()[0]) from error
    except (OSError, NotImplementedError):
        warnings.warn(
            f"the disk of {shown} has no locks: make sure that no other run writes there",
            stacklevel=3,
        )
    try:
        yield
    finally:
        lock.release()


def check_folders(config: TrainConfig) -> None:
    """Refuse to write among photos, class images or a model's files.

    Photos may lie in a folder of their own inside ``output_dir``, where no run writes.

    Raises:
        ConfigError: With the two settings that point to one place.
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
    for setting in ("instance_data_dir", "validation_data_dir"):
        folder = _folder(getattr(config, setting))
        if folder is None:
            continue
        _apart("output_dir", output, setting, folder)
        checkpoints = (path.name for path in output.glob("checkpoint-*"))
        for name in (*_OWN_FOLDERS, config.logging_dir, *checkpoints):
            _apart(setting, folder, f"the run's {name},", output / name)
    folder = _folder(config.class_data_dir) if config.uses_class_images else None
    if folder is not None and folder == photos:
        raise ConfigError(
            f"class_data_dir is the folder of the subject's photos, {folder}; class images show "
            "other members of the class: choose another folder, or leave it out",
            "class_data_dir",
        )
    if folder in (output, output / "samples", output / config.logging_dir):
        raise ConfigError(
            f"class_data_dir {folder} is where the run writes its own images and files; choose "
            "another folder, or leave it out",
            "class_data_dir",
        )


def _folder(name: str | None) -> Path | None:
    """An existing local folder; None for anything else, such as a hub id or a single file."""
    path = Path(name or "").expanduser()
    return path.resolve() if name and path.is_dir() else None


def _apart(inner_name: str, inner: Path, outer_name: str, outer: Path) -> None:
    """Refuse a folder that is another, or lies inside it."""
    if inner == outer:
        raise ConfigError(
            f"{inner_name} and {outer_name} are one folder, {inner}; choose another for one of "
            "them",
            inner_name,
        )
    if outer in inner.parents:
        raise ConfigError(
            f"{inner_name} {inner} lies inside {outer_name} {outer}; choose another folder",
            inner_name,
        )


def _check_contents(config: TrainConfig, folder: Path) -> None:
    """Refuse to write over another run's result, or files that no run made, by accident."""
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
            f"output_dir {folder} already contains a trained adapter or model, and no checkpoint "
            "to resume from (a run with --checkpointing_steps 0 keeps none); choose another, or "
            "start over with --overwrite_output_dir",
            "output_dir",
        )
    foreign = [name for name in _COMMON_NAMES if (folder / name).exists()]
    if foreign and not (folder / METRICS_NAME).exists():
        raise ConfigError(
            f"output_dir {folder} holds {' and '.join(foreign)}, which no run has written and this "
            "one would replace; choose another output_dir, or replace with --overwrite_output_dir",
            "output_dir",
        )


def holds_result(folder: Path) -> bool:
    """Return whether a run that has ended left an adapter or a model here."""
    return any(folder.glob("*.safetensors")) or (folder / PIPELINE_NAME).exists()


def clear_folder(folder: Path, step: int) -> None:
    """Remove what an earlier run left after a step, so that nothing takes it for this one's."""
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
        files = (*embeddings, *adapters, *samples)
        for path in (*files, model.with_suffix(".safetensors"), folder / "README.md"):
            path.unlink(missing_ok=True)
