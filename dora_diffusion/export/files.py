"""Models that are opened, and outputs that a refused or interrupted export leaves as they were."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dora_diffusion import system
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.formats.adapter.file import AdapterFile, embeddings_beside
from dora_diffusion.formats.adapter.inspect import AdapterReport, report_on
from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder, StoredModel
from dora_diffusion.formats.files.atomic import DiskFullError, disk_full, require_writable
from dora_diffusion.formats.files.stream import PICKLED
from dora_diffusion.formats.layouts.other import layout_named

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


@check_arguments()
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


def check_model_output(output: Path, base: Path, inputs: Sequence[Path], overwrite: bool) -> None:
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
    _refuse_pickle(output)
    source, target = base.resolve(), output.resolve()
    if source in target.parents or target in source.parents:
        raise ExportError(
            f"{output} and the base {base} lie inside one another; choose another name"
        )
    require_writable(output.parent, is_folder=True)
    inside = [path for path in inputs if path.is_dir() and path.resolve() in target.parents]
    _refuse_inputs(output, (base, *inputs), inside)
    refuse_existing([output], overwrite)
    if output.is_dir() and output.suffix == ".safetensors":
        raise ExportError(f"{output} is a folder; a single file cannot replace it")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise ExportError(f"{output} is a folder but not a model; it will not be replaced")
    if output.is_file() and output.suffix != ".safetensors":
        raise ExportError(f"{output} is a file but not a model; it will not be replaced")


def check_adapter_output(
    output: Path, kind: str, adapter: AdapterFile, inputs: Sequence[Path], overwrite: bool
) -> dict[str, Path]:
    """Refuse an output that exists, would replace what it is made from, or cannot be written.

    Args:
        output: The file to write, or a folder for it.
        kind: The layout that it is written in.
        adapter: What has the tokens that are written beside it.
        inputs: What is read.
        overwrite: Whether files that exist may be replaced.

    Returns:
        The files of the adapter's tokens, by token.

    Raises:
        ExportError: If it, or one of these, is refused.
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
    """Refuse an output that is there, and is or holds what is read, or lies in some of that."""
    for path in inputs if output.exists() else ():
        # Of a folder in PEFT's layout, one component's may be read.
        is_same = path.exists() and output.samefile(path)
        if is_same or path in around or output.resolve() in path.resolve().parents:
            raise ExportError(
                f"{output} is or holds {path.name}, which is read for it; choose another name"
            )


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
