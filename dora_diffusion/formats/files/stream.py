"""Safetensors files read and written one tensor at a time.

Writing a file directly keeps one tensor in memory, and makes it a pure function of its content
(names in a fixed order), so equal adapters are equal files. Reading it directly, not through a
memory map, keeps the memory in use to one tensor, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.files.atomic import SyncedFile, atomic_file
from dora_diffusion.formats.files.header import (
    DTYPE_NAMES,
    TensorFileError,
    TensorSpec,
    read_header,
)
from dora_diffusion.numerics.threads import map_ahead


class TensorReader:
    """Lazy access to the tensors of one file, or of all shards of an ``.index.json``.

    Use as a context manager. ``specs`` maps every name to its dtype and shape, ``metadata`` is the
    metadata of the (first) file, and ``reader[name]`` loads one tensor, in any thread.

    Raises:
        TensorFileError: For a broken file, or an index that its shards do not fulfil.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        self.files = shard_files(self.path)
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        self.file_of: dict[str, Path] = {}
        self._starts: dict[str, int] = {}
        for file in self.files:
            header = read_header(file)
            self.metadata = self.metadata or header.metadata
            if repeated := self.specs.keys() & header.specs.keys():
                raise TensorFileError(f"{self.path.name}: in two shards: {listing(repeated)}")
            self.specs.update(header.specs)
            self._starts.update(header.starts)
            self.file_of.update(dict.fromkeys(header.specs, file))
        if lost := _promised(self.path) - self.specs.keys():
            raise TensorFileError(f"{self.path.name}: in no shard: {listing(lost)}")
        self._handles: dict[Path, BufferedReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        """Return the reader; files are opened when a tensor of theirs is asked for."""
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()

    def names_in(self, file: Path) -> list[str]:
        """The tensors that one of its files holds."""
        return [name for name, holder in self.file_of.items() if holder == file]

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""
        file, spec = self.file_of[name], self.specs[name]
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        with self._lock:
            if file not in self._handles:
                self._handles[file] = self._stack.enter_context(file.open("rb"))
            self._handles[file].seek(self._starts[name])
            if self._handles[file].readinto(raw.numpy().data) != spec.nbytes:
                raise TensorFileError(f"{file.name} was cut short while it was read")
        return raw.view(spec.dtype).view(spec.shape)


def shard_files(path: Path) -> list[Path]:
    """The safetensors files behind ``path``: itself, or the shards that its index names."""
    if not _is_index(path):
        return [path]
    names = set(_weight_map(path).values())
    if bad := [name for name in names if Path(name).name != name]:
        raise TensorFileError(f"{path.name} names shards outside its folder: {listing(bad)}")
    files = [path.parent / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise TensorFileError(f"{path.name}: missing shards: {listing(missing)}")
    return files


def _is_index(path: Path) -> bool:
    # That of a variant is called `model.safetensors.index.fp16.json`.
    return path.suffix == ".json" and ".index" in path.name


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor -> name of the shard that holds it."""
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in places.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise TensorFileError(f"{index.name} is not an index of shards: {error!r}") from error


def _promised(path: Path) -> set[str]:
    """The tensors that an index says there are; none for a single file."""
    return set(_weight_map(path)) if _is_index(path) else set()


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    final_metadata: Callable[[], Mapping[str, str]] | None = None,
    on_written: Callable[[int], None] | None = None,
) -> Path:
    """Write one file atomically, asking ``load(name)`` for one tensor after the other.

    A few tensors are made at once, in threads, while earlier ones are written. They are ordered by
    descending item size, then by name: every tensor stays aligned.

    Args:
        path: The file.
        specs: Dtype and shape of each tensor.
        load: Makes a tensor, in any thread.
        metadata: The file's metadata.
        final_metadata: Called when all tensors are written; takes the place of ``metadata``, whose
            encoding must be as long. For values that take time to compute, such as hashes.
        on_written: Called with the number of bytes of each tensor that is written.

    Raises:
        TensorFileError: If a tensor differs from its spec, or the reopened file from the intended.
        DiskFullError: If the disk fills up. A file that was at ``path`` is untouched.
    """
    order, notes = _file_order(specs), dict(metadata or {})
    with atomic_file(path) as temporary:
        with SyncedFile(temporary) as file:
            header = _encode_header(order, specs, notes)
            file.write(header)
            for name, tensor in map_ahead(load, order):
                _write_one(file, name, specs[name], tensor)
                if on_written is not None:
                    on_written(specs[name].nbytes)
            if final_metadata is not None:
                notes = dict(final_metadata())
                final = _encode_header(order, specs, notes)
                assert len(final) == len(header)
                file.replace_start(final)
        written = read_header(temporary)
        if written.specs != dict(specs) or written.metadata != notes:
            raise TensorFileError(f"{path.name} did not read back as it was written")
    return path


def _file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the data (all behind the header) of the file that `save_tensors` writes."""
    digest = hashlib.sha256()
    for name in _file_order({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}):
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a dict of tensors atomically; raises as ``write_tensors`` does."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return write_tensors(path, specs, tensors.__getitem__, metadata)


def _encode_header(
    order: list[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_one(file: SyncedFile, name: str, spec: TensorSpec, tensor: Tensor) -> None:
    if TensorSpec.of(tensor) != spec:
        raise TensorFileError(
            f"{name}: expected {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    file.write(_raw(tensor))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
