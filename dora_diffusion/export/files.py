"""Models that are opened, and outputs that a refused or interrupted export leaves as they were."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dora_diffusion import system
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.formats.adapter.file import AdapterFile, embeddings_beside
from dora_diffusion.formats.adapter.inspect import AdapterReport, report_on
from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder, StoredModel
from dora_diffusion.formats.files.atomic import DiskFullError, disk_full, require_writable
from dora_diffusion.formats.files.stream import PICKLED

# Called with the number of bytes written so far, and of all.
OnProgress = Callable[[int, int], None]

_SPARE_BYTES = 32 * 2**20


class ExportError(ValueError):
    """An export that was refused or failed its own check, with the reason."""


def model_name(path: Path) -> str:
    """Return a model's name: its hub id in the hub's cache, else its file or folder alone."""
    path = path.resolve()
    parts = path.parts[-3:]
    if len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "snapshots":
        return parts[0].removeprefix("models--").replace("--", "/", 1)
    return path.name


@contextlib.contextmanager
def open_model(model: AnyModel) -> Iterator[StoredModel]:
    """Open a model and close its files afterwards.

    Args:
        model: A diffusers folder, a hub id, ``embedded:NAME``, or a ``.safetensors`` checkpoint;
            or one of these as a `BaseModel`.

    Raises:
        ExportError: If it is a pickle.
        TensorFileError: If its weights (of the variant) are missing, damaged or pickled.
        UnsupportedModelError, ModelNotFoundError: If it is another kind of model, or none.
    """
    # Imported here: the model layer may import heavy libraries.
    from dora_diffusion.models.locate import resolve_folder

    base = BaseModel.of(model)
    file = Path(base.path).expanduser()
    if file.suffix in PICKLED:
        raise ExportError(
            f"{file.name} is a pickle, which can run code when opened; give a .safetensors file"
        )
    if file.suffix == ".safetensors" and file.is_file():
        with CheckpointFile.open(file) as checkpoint:
            yield checkpoint
        return
    with PipelineFolder.open(resolve_folder(base), base.variant) as pipeline:
        yield pipeline


def inspect_adapter(path: str | Path, base: AnyModel | None = None) -> AdapterReport:
    """Report what an adapter is.

    Args:
        path: An adapter file or folder.
        base: A model that it may fit, as `open_model` takes it.

    Raises:
        AdapterFormatError: If it is not an adapter that can be read, with the reason.
    """
    if base is None:
        return report_on(path)
    with open_model(base) as model:
        return report_on(path, model)


class ProgressReporter:
    """Counts written bytes and passes the count on."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def step(self, nbytes: int) -> None:
        """Count the bytes of one tensor."""
        self.done += nbytes
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def check_space(output: Path, needed: int) -> None:
    """Refuse an export that will not fit.

    Raises:
        DiskFullError: With the numbers, before anything is written.
    """
    folder = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        error = disk_full(output)
        text = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free"
        raise DiskFullError(error.errno, f"{error.strerror} ({text})")


def check_output(output: Path, base: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Args:
        output: The file or folder to write.
        base: The base model.
        inputs: What else is read: adapters, and another autoencoder.
        overwrite: Whether an output that exists may be replaced.

    Raises:
        ExportError: If the output exists (and is not to be replaced, or is not a model), lies
            inside the base or around it, is or holds an input, or asks for a pickle.
        OSError: If its folder cannot be written to.
    """
    source, target = base.resolve(), output.resolve()
    if output.suffix in PICKLED:
        raise ExportError(f"{output.name}: pickles are not written; use the suffix .safetensors")
    if source in target.parents or target in source.parents:
        raise ExportError(
            f"{output} and the base {base} lie inside one another; choose another name"
        )
    require_writable(output.parent, is_folder=True)
    if not output.exists():
        return
    for path in (base, *inputs):
        taken = path.resolve()
        is_inside = taken.is_dir() and taken in target.parents
        if target == taken or target in taken.parents or is_inside:
            raise ExportError(
                f"{output} is or holds {path.name}, which is read for it; choose another name"
            )
    refuse_existing([output], overwrite)
    if output.is_dir() and output.suffix == ".safetensors":
        raise ExportError(f"{output} is a folder; a single file cannot replace it")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise ExportError(f"{output} is a folder but not a model; it will not be replaced")
    if output.is_file() and output.suffix != ".safetensors":
        raise ExportError(f"{output} is a file but not a model; it will not be replaced")


def refuse_existing(outputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse outputs that exist, where nothing is to be overwritten.

    Raises:
        ExportError: Of the first that does.
    """
    for path in outputs:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists; choose another name, or overwrite it (--overwrite)")


@contextlib.contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """A name beside ``output`` for a file or folder; what is left there in the end is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, output: Path) -> None:
    """Move a finished folder to its place; a folder that is there goes only once it is replaced."""
    if not output.exists():
        system.replace(temporary, output)
        return
    with temporary_sibling(output) as old:
        try:
            system.replace(output, old)
            system.replace(temporary, output)
        except BaseException:  # an interruption, too
            if old.exists() and not output.exists():
                system.replace(old, output)
            raise


def check_overwrite(output: Path, adapter: AdapterFile, overwrite: bool) -> dict[str, Path]:
    """Return the files beside an adapter for its tokens, by token.

    Raises:
        ExportError: If one of these files exists, and may not be replaced.
    """
    embeddings = embeddings_beside(output, adapter)
    refuse_existing(embeddings.values(), overwrite)
    return embeddings
