"""Opening of models, and outputs that are checked first and replaced atomically."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion import system
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.pipeline_index import is_pipeline
from dora_diffusion.formats.adapter.file import AdapterFile, embeddings_beside
from dora_diffusion.formats.adapter.inspect import AdapterReport, report_on
from dora_diffusion.formats.files.atomic import DiskFullError, disk_full, require_writable
from dora_diffusion.formats.files.stream import PICKLED
from dora_diffusion.formats.layouts.layout import layout_named

if TYPE_CHECKING:
    from dora_diffusion.formats.checkpoint.models import StoredModel

# Called with (bytes written, total bytes).
OnProgress = Callable[[int, int], None]

_SPARE_BYTES = 32 * 2**20


class ExportError(ValueError):
    """Error of an export that was refused or failed its check, with the reason."""


def model_name(path: Path) -> str:
    """Return a model's name: its hub id if it is in the hub's cache, else its file or folder."""
    path = path.resolve()
    names = path.parts[-3:]
    if len(names) == 3 and names[0].startswith("models--") and names[1] == "snapshots":
        return names[0].removeprefix("models--").replace("--", "/", 1)
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
        UnsupportedModelError, ModelNotFoundError: If it is another kind of model, or not a model.
    """
    # Late imports: commands without a base need no model code.
    from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder
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


def inspect_adapter(path: str | PathLike[str], base: AnyModel | None = None) -> AdapterReport:
    """Report the method, layers, metadata and compatible programs of an adapter.

    Args:
        path: An adapter file or folder.
        base: A model to check the adapter against, as in `open_model`.

    Raises:
        AdapterFormatError: If it cannot be read as an adapter, with the reason.
    """
    if base is None:
        return report_on(Path(path))
    with open_model(base) as model:
        return report_on(Path(path), model)


class ProgressReporter:
    """Counter of written bytes that reports to ``on_progress``."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def step(self, nbytes: int) -> None:
        """Count the bytes of one tensor."""
        self.done += nbytes
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def check_space(output: Path, needed: int) -> None:
    """Check that an export fits on the disk.

    Raises:
        DiskFullError: If it does not, with the needed and free space.
    """
    folder = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        error = disk_full(output)
        text = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free"
        raise DiskFullError(error.errno, f"{error.strerror} ({text})")


def check_model_output(output: Path, base: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that writing an output would not destroy other files.

    Args:
        output: The file or folder to write.
        base: The base model.
        inputs: Other inputs: adapters, and another autoencoder.
        overwrite: Whether an existing output may be replaced.

    Raises:
        ExportError: If the output exists and may not be replaced or is not a model, is inside the
            base or contains it, is or contains an input, or is named as a pickle.
        OSError: If its folder cannot be written to.
    """
    _refuse_pickle(output)
    source, target = base.resolve(), output.resolve()
    if source in target.parents or target in source.parents:
        raise ExportError(
            f"one of {output} and the base {base} contains the other; choose another name"
        )
    require_writable(output.parent, is_folder=True)
    inside = [path for path in inputs if path.is_dir() and path.resolve() in target.parents]
    _refuse_inputs(output, (base, *inputs), inside)
    refuse_existing([output], overwrite)
    if output.is_dir() and output.suffix == ".safetensors":
        raise ExportError(f"{output} is a folder; a single file cannot replace it")
    if output.is_dir() and any(output.iterdir()) and not is_pipeline(output):
        raise ExportError(f"{output} is a folder but not a model; it will not be replaced")
    if output.is_file() and output.suffix != ".safetensors":
        raise ExportError(f"{output} is a file but not a model; it will not be replaced")


def check_adapter_output(
    output: Path, kind: str, adapter: AdapterFile, inputs: Sequence[Path], overwrite: bool
) -> dict[str, Path]:
    """Check that an output can be written, does not exist, and would not replace an input.

    Args:
        output: The file to write, or a folder for it.
        kind: The layout to write.
        adapter: Adapter with the tokens to write.
        inputs: Files that are read.
        overwrite: Whether existing files may be replaced.

    Returns:
        The files of the adapter's tokens, by token.

    Raises:
        ExportError: If a check of the output, or of a token's file, fails.
        OSError: If its folder cannot be written to.
    """
    _refuse_pickle(output)
    name = layout_named(kind).file_name
    file = output if output.suffix == ".safetensors" or name is None else output / name
    require_writable(file, is_folder=name is None)
    _refuse_inputs(file, inputs)
    embeddings = embeddings_beside(output, adapter)
    refuse_existing((file, *embeddings.values()), overwrite)
    return embeddings


def _refuse_pickle(output: Path) -> None:
    if output.suffix in PICKLED:
        raise ExportError(f"{output.name}: pickles are not written; use the suffix .safetensors")


def _refuse_inputs(output: Path, inputs: Iterable[Path], around: Sequence[Path] = ()) -> None:
    """Check that an existing output is not an input, contains none, and is not in ``around``."""
    for path in inputs if output.exists() else ():
        # The input may be one component's folder in a folder of PEFT's layout.
        is_same = path.exists() and output.samefile(path)
        if is_same or path in around or output.resolve() in path.resolve().parents:
            raise ExportError(f"{output} is or contains the input {path.name}; choose another name")


def refuse_existing(outputs: Iterable[Path], overwrite: bool) -> None:
    """Check that no output exists, unless existing files may be overwritten.

    Raises:
        ExportError: If one exists; names the first.
    """
    for path in outputs:
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists; choose another name, or overwrite it (--overwrite)")


@contextlib.contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``output``. A file or folder left there is removed."""
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
    """Move a finished folder to its place. An existing folder is removed only after the move."""
    if not output.exists():
        system.replace(temporary, output)
        return
    with temporary_sibling(output) as old:
        try:
            system.replace(output, old)
            system.replace(temporary, output)
        except BaseException:  # Including an interruption.
            if old.exists() and not output.exists():
                system.replace(old, output)
            raise
