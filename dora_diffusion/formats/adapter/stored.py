"""Location, layout and content of an adapter's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.formats.adapter.metadata import AdapterMetadata, parse_metadata
from dora_diffusion.formats.files.runs import VERA_FILE, pipeline_in
from dora_diffusion.formats.files.stream import PICKLED, TensorFileError, TensorReader, file_hash
from dora_diffusion.formats.layouts.comfyui_pair import pair_files
from dora_diffusion.formats.layouts.dotted import (
    DIFFUSERS,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    peft_config,
    peft_folders,
)
from dora_diffusion.formats.layouts.layout import (
    BUNDLED_TOKEN,
    AdapterFormatError,
    AdapterLayout,
    layout_of,
)

PIVOTAL = "_emb"
"""Suffix of the file of tokens of Diffusers' advanced scripts, ``NAME_emb.safetensors``."""


class StoredFile:
    """One tensor file of an adapter, whose header is read once.

    Attributes:
        path: The file.
        specs: Dtype and shape of every tensor.
        metadata: Metadata of the file.
        config: The ``adapter_config.json`` of a PEFT folder; None for other files.

    Raises:
        AdapterFormatError: If it is damaged, or a pickle.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        pickled = path.with_suffix(".bin")
        if not path.exists() and pickled.exists():  # Some PEFT folders contain a pickle.
            path = pickled
        if path.suffix in PICKLED:
            raise AdapterFormatError(
                f"{path.name} is a pickle, which can run code when opened; ask for a .safetensors "
                "file"
            )
        self.path, self.config = path, config
        with _as_format_error():
            self._reader = TensorReader(path)
        self.specs, self.metadata = self._reader.specs, self._reader.metadata

    def tensors(self) -> dict[str, Tensor]:
        with _as_format_error(), self._reader as reader:
            return {name: reader[name] for name in reader.specs}


@contextlib.contextmanager
def _as_format_error() -> Iterator[None]:
    try:
        yield
    except TensorFileError as error:
        raise AdapterFormatError(str(error)) from error


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk.

    Attributes:
        path: The file or folder.
        files: Files of the adapter; a PEFT folder has one for each component.
        layout: Layout of the files.
    """

    path: Path
    files: Sequence[StoredFile]
    layout: AdapterLayout

    @classmethod
    def open(cls, path: str | Path) -> StoredAdapter:
        """Read the headers of an adapter's files.

        Raises:
            AdapterFormatError: If a file is damaged, or the path is not an adapter.
            FileNotFoundError: If the path does not exist.
        """
        path = find_adapter(path)
        has_config = path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file()
        if pair := pair_files(path):
            files = [StoredFile(file) for file in pair]
        elif path.is_dir() or has_config:
            folders = peft_folders(path.parent if has_config else path)
            files = [StoredFile(folder / PEFT_FILE, peft_config(folder)) for folder in folders]
        else:
            files = [StoredFile(path)]
            if any(key.startswith(PEFT_PREFIX) for key in files[0].specs):
                raise AdapterFormatError(f"{path.name} is a PEFT file without its {PEFT_CONFIG}")
        keys = [key for file in files for key in file.specs if not BUNDLED_TOKEN.fullmatch(key)]
        return cls(path, files, layout_of(keys, files[0].metadata))

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(file.path.stat().st_size for file in self.files)


def read_metadata(path: str | Path) -> AdapterMetadata:
    """Read an adapter's metadata, cached until the file is written again.

    Raises:
        AdapterFormatError, FileNotFoundError: As in `StoredAdapter.open`.
    """
    file = find_adapter(path).absolute()
    status = file.stat()
    return _metadata_of(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _metadata_of(file: Path, written: int, size: int) -> AdapterMetadata:
    return parse_metadata(StoredAdapter.open(file).files[0].metadata)


def find_adapter(path: str | Path) -> Path:
    """Return the adapter at a path: a file, or a folder of PEFT or of two files for ComfyUI.

    Raises:
        FileNotFoundError: If the path does not exist.
        AdapterFormatError: If a folder contains no adapter, or several.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter at {path}")
    if path.is_file():
        return path
    if (path / DIFFUSERS.file_name).is_file():
        return path / DIFFUSERS.file_name
    if peft_folders(path) or pair_files(path):
        return path
    if model := pipeline_in(path):
        what = "is a model" if model == path else "contains a model whose weights were trained"
        raise AdapterFormatError(
            f"{path} {what}, not an adapter: give it as --base, or make an adapter from it with "
            "'dora-diffusion extract --base BASE --tuned MODEL --rank RANK --output ADAPTER'"
        )
    files = sorted(path.glob("*.safetensors"))
    # The VeRA file is a second copy of the ordinary file's adapter.
    files = [file for file in files if file.name != VERA_FILE] or files
    # Files of tokens from Diffusers' advanced scripts belong to another file.
    files = [file for file in files if not file.stem.endswith(PIVOTAL)] or files
    files = files or sorted(path.glob("pytorch_lora_weights.bin"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        problem = f"name one of its files: {names}" if files else "no adapter file in it"
        raise AdapterFormatError(f"{path}: {problem}")
    return files[0]


def adapter_hash(path: str | Path) -> str:
    """Return the SHA-256 of an adapter's file, or of a PEFT folder's files in order."""
    adapter = find_adapter(path)
    return file_hash(sorted(adapter.rglob(PEFT_FILE)) if adapter.is_dir() else [adapter])
