"""Where an adapter is, and what its file holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dora_diffusion.formats.adapter.keys import AdapterFormatError
from dora_diffusion.formats.adapter.peft_folder import peft_folders
from dora_diffusion.formats.adapter.targets.peft import DIFFUSERS_FILE
from dora_diffusion.formats.adapter.vera import VERA_FILE
from dora_diffusion.formats.checkpoint.places import pipeline_in
from dora_diffusion.formats.files.header import PICKLED, TensorFileError
from dora_diffusion.formats.files.stream import TensorReader


def find_adapter(path: str | Path) -> Path:
    """The adapter behind a path: a file, or the PEFT folder itself.

    Raises:
        FileNotFoundError: If nothing is there.
        AdapterFormatError: If a folder holds no adapter, or several without saying which.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter at {path}")
    if path.is_file():
        return path
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE
    if peft_folders(path):
        return path
    if model := pipeline_in(path):
        what = "is a model" if model == path else "holds a model that was trained whole"
        raise AdapterFormatError(
            f"{path} {what}, not an adapter: give it as --base, or make an adapter of it with "
            "dora-diffusion extract"
        )
    files = sorted(path.glob("*.safetensors"))
    # Beside the ordinary file it holds the same.
    files = [file for file in files if file.name != VERA_FILE] or files
    files = files or sorted(path.glob("pytorch_lora_weights.bin"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        problem = f"name one of its files: {names}" if files else "no adapter file in it"
        raise AdapterFormatError(f"{path}: {problem}")
    return files[0]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
        AdapterFormatError: If it is damaged, or a pickle.
    """
    pickled = path.with_suffix(".bin")
    if not path.exists() and pickled.exists():  # what a PEFT folder may hold instead
        path = pickled
    if path.suffix in PICKLED:
        raise AdapterFormatError(
            f"{path.name} is a pickle, which can run code when opened; ask for a .safetensors file"
        )
    try:
        with TensorReader(path) as reader:
            return {name: reader[name] for name in reader.specs}, reader.metadata
    except TensorFileError as error:
        raise AdapterFormatError(str(error)) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of a format error, so that a batch tells which file it was."""
    try:
        yield
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path.name}: {error}") from error
