"""Reading and writing of safetensors files, one tensor at a time.

A safetensors file has 8 bytes of header length (little endian), a JSON header
``{name: {dtype, shape, data_offsets}}`` with optional strings in ``__metadata__``, and the raw
data.

Writing files directly needs memory for only a few tensors and gives equal files for equal adapters,
since names have a fixed order. Reading without a memory map also needs memory for only one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.files.atomic import SyncedFile, atomic_file
from dora_diffusion.numerics.threads import map_ahead

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**18  # Fits the processor's cache between reading and hashing.
# Suffixes of files that can execute code. They are never opened.
PICKLED = (".ckpt", ".bin", ".pt", ".pth")


class TensorFileError(ValueError):
    """Error for a tensor file that cannot be read, or was not written correctly."""


@dataclass(frozen=True)
class TensorSpec:
    """Header entry of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the raw data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Header:
    """Parsed header of a file.

    Attributes:
        specs: Dtypes and shapes of the tensors, in the order of the header.
        metadata: Metadata of the file.
        starts: Offset of each tensor's data in the file, in bytes.
    """

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file without reading tensors.

    Raises:
        TensorFileError: If the file is not a valid safetensors file: truncated or too long, with
            duplicate names, or with overlapping data or gaps.
        OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with safe_open(path, "np"):  # It checks everything except duplicate names.
                length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            metadata = header.pop("__metadata__", None) or {}
            specs = {
                k: TensorSpec(DTYPES[v["dtype"]], tuple(v["shape"])) for k, v in header.items()
            }
        except (SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise TensorFileError(
                f"{Path(path).name} is not a safetensors file, or is cut short: {error}"
            ) from error
    starts = {key: 8 + length + item["data_offsets"][0] for key, item in header.items()}
    return Header(specs, metadata, starts)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a name appears twice")
    return items


class TensorReader:
    """Lazy access to the tensors of one file, or of all shards of an ``.index.json``.

    Use as a context manager. ``specs`` maps every name to its dtype and shape, ``metadata`` is the
    metadata of the (first) file. ``reader[name]`` loads one tensor, in any thread.

    Raises:
        TensorFileError: If a file is damaged, or the shards do not match their index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        # The index of a variant has a name such as `model.safetensors.index.fp16.json`.
        is_index = self.path.suffix == ".json" and ".index" in self.path.name
        shards = _weight_map(self.path) if is_index else {}
        self.files = sorted({*shards.values()}) if is_index else [self.path]
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        self.file_of: dict[str, Path] = {}
        self._starts: dict[str, int] = {}
        for file in self.files:
            header = read_header(file)
            self.metadata = self.metadata or header.metadata
            if repeated := self.specs.keys() & header.specs.keys():
                raise TensorFileError(f"{self.path.name}: in two shards: {listing(repeated)}")
            self.specs |= header.specs
            self._starts |= header.starts
            self.file_of |= dict.fromkeys(header.specs, file)
        if missing := shards.keys() - self.specs.keys():
            raise TensorFileError(f"{self.path.name}: in no shard: {listing(missing)}")
        self._handles: dict[Path, BufferedReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        """Return the reader. Files are opened when their first tensor is read."""
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""
        return self._read(name, 0, self.specs[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load the entries ``start`` to ``stop`` (exclusive) of a tensor's first axis."""
        dtype, (_, *row_shape) = self.specs[name].dtype, self.specs[name].shape
        offset = TensorSpec(dtype, (start, *row_shape)).nbytes
        return self._read(name, offset, TensorSpec(dtype, (stop - start, *row_shape)))

    def _read(self, name: str, offset: int, spec: TensorSpec) -> Tensor:
        """Load part of a tensor, from an offset in bytes."""
        file, raw = self.file_of[name], torch.empty(spec.nbytes, dtype=torch.uint8)
        with self._lock:
            if file not in self._handles:
                self._handles[file] = self._stack.enter_context(file.open("rb"))
            self._handles[file].seek(self._starts[name] + offset)
            if self._handles[file].readinto(raw.numpy().data) != spec.nbytes:
                raise TensorFileError(f"{file.name} was truncated while it was read")
        return raw.view(spec.dtype).view(spec.shape)


def _weight_map(index: Path) -> dict[str, Path]:
    """Read an index. Returns the shard of each tensor."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise TensorFileError(f"{index.name} is not an index of shards: {error!r}") from error
    names = sorted({*shards.values()})
    if bad := [name for name in names if Path(name).name != name]:
        raise TensorFileError(f"{index.name} names shards outside its folder: {listing(bad)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise TensorFileError(f"{index.name}: missing shards: {listing(missing)}")
    return {name: index.parent / shard for name, shard in shards.items()}


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    final_metadata: Callable[[], Mapping[str, str]] | None = None,
    on_written: Callable[[int], None] | None = None,
) -> Path:
    """Write a file atomically, calling ``load(name)`` for one tensor after the other.

    A few tensors are computed in threads while earlier ones are written. Tensors are ordered by
    descending item size, then by name, so that all are aligned.

    Args:
        path: The file.
        specs: Dtype and shape of each tensor.
        load: Returns a tensor, in any thread.
        metadata: Metadata of the file.
        final_metadata: Called after all tensors are written. Its result replaces ``metadata`` and
            must have the same encoded length. For values that take time to compute, such as hashes.
        on_written: Called with the number of bytes of each written tensor.

    Raises:
        TensorFileError: If a tensor does not match its spec, or the file does not read back.
        DiskFullError: If the disk is full. An existing file at ``path`` is unchanged.
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
    """Return the SHA-256 of the data after the header in a file of `save_tensors`."""
    digest = hashlib.sha256()
    for name in _file_order({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}):
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def file_hash(files: Sequence[Path], *, is_data: bool = False) -> str:
    """Return the SHA-256 of a file, or of the concatenation of several files.

    Args:
        files: The files.
        is_data: Whether to hash only the data after the header of a safetensors file.
    """
    blob = files[0].resolve()
    is_blob = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    # The hub's cache names large files by their hash.
    if len(files) == 1 and is_blob and not is_data:
        return blob.name
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            if is_data:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a dict of tensors atomically (`write_tensors`)."""
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
        spec, start = specs[name], offset
        offset += spec.nbytes
        facts = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
        header[name] = facts | {"data_offsets": [start, offset]}
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
