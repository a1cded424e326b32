"""Safetensors files read and written one tensor at a time.

A safetensors file is 8 bytes of header length (little endian), a JSON header
``{name: {dtype, shape, data_offsets}}`` with optional string ``__metadata__``, and the raw bytes.

Writing a file directly keeps one tensor in memory, and makes it a pure function of its content
(names in a fixed order), so equal adapters are equal files. Reading it directly, not through a
memory map, keeps the memory in use to one tensor, too.
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
_CHUNK = 2**18  # stays in the processor's cache between reading and hashing
# Suffixes of files that can run code when they are opened, and never are.
PICKLED = (".ckpt", ".bin", ".pt", ".pth")


class TensorFileError(ValueError):
    """A tensor file that cannot be read, or did not come out as intended."""


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
    """The parsed header of a file.

    Attributes:
        specs: Its tensors, in the header's order.
        metadata: Its metadata.
        starts: Where each tensor's data begins, in bytes from the start of the file.
    """

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file without touching its tensors.

    Raises:
        TensorFileError: If the file is not a complete safetensors file: cut short or too long,
            a name twice, data that overlap or leave gaps.
        OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with safe_open(path, "np"):  # It checks all but names that appear twice.
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
        TensorFileError: For a broken file, or an index that its shards do not fulfil.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        # An index of a variant is called `model.safetensors.index.fp16.json`.
        is_index = self.path.suffix == ".json" and ".index" in self.path.name
        promised = _weight_map(self.path) if is_index else {}
        self.files = sorted({*promised.values()}) if is_index else [self.path]
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
        if lost := promised.keys() - self.specs.keys():
            raise TensorFileError(f"{self.path.name}: in no shard: {listing(lost)}")
        self._handles: dict[Path, BufferedReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        """Return the reader; files are opened when a tensor of theirs is asked for."""
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""
        return self._read(name, 0, self.specs[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load rows of one tensor, from ``start`` to before ``stop``: entries of its first axis."""
        dtype, (_, *others) = self.specs[name].dtype, self.specs[name].shape
        before = TensorSpec(dtype, (start, *others)).nbytes
        return self._read(name, before, TensorSpec(dtype, (stop - start, *others)))

    def _read(self, name: str, before: int, spec: TensorSpec) -> Tensor:
        """Load what lies in a tensor after some bytes."""
        file, raw = self.file_of[name], torch.empty(spec.nbytes, dtype=torch.uint8)
        with self._lock:
            if file not in self._handles:
                self._handles[file] = self._stack.enter_context(file.open("rb"))
            self._handles[file].seek(self._starts[name] + before)
            if self._handles[file].readinto(raw.numpy().data) != spec.nbytes:
                raise TensorFileError(f"{file.name} was cut short while it was read")
        return raw.view(spec.dtype).view(spec.shape)


def _weight_map(index: Path) -> dict[str, Path]:
    """Name of each tensor -> the shard that holds it."""
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in places.items()}
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


def file_hash(files: Sequence[Path], *, is_data: bool = False) -> str:
    """SHA-256 of one file, or of several one after the other.

    Args:
        files: The files.
        is_data: Hash the data of a safetensors file only, which is all behind its header.
    """
    blob = files[0].resolve()
    is_blob = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    # The hub's cache names large files so.
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
