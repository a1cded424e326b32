"""Safetensors files read and written one tensor at a time.

A safetensors file is 8 bytes of header length (little endian), a JSON header
``{name: {dtype, shape, data_offsets}}`` with optional string ``__metadata__``, and the raw bytes.
Writing it directly keeps one tensor in memory, and makes a file a pure function of its content
(names in a fixed order), so equal adapters are equal files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


class TensorFileError(ValueError):
    """A tensor file that cannot be read, or did not come out as intended."""


class DiskFullError(OSError):
    """The disk filled up while writing; the previous file is untouched."""


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the raw data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Header:
    """The parsed header of a file: its tensors in file order, and its metadata."""

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file without touching its tensors.

    Raises:
        TensorFileError: If the file is not a complete safetensors file.
        OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise TensorFileError(f"{Path(path).name} is not a safetensors file, or is cut short")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        notes = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        found = {name: (_parse_spec(item), item["data_offsets"]) for name, item in header.items()}
        end = max((int(stop) for _, (_, stop) in found.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"{Path(path).name} has a broken header: {error!r}") from error
    if wrong := [n for n, (spec, (start, stop)) in found.items() if stop - start != spec.nbytes]:
        raise TensorFileError(f"{Path(path).name} has a broken header: {_listing(wrong)}")
    if 8 + length + end != size:
        raise TensorFileError(
            f"{Path(path).name} is cut short: {size} bytes, its header promises {8 + length + end}"
        )
    return Header({name: spec for name, (spec, _) in found.items()}, notes)


def _parse_spec(item: dict[str, Any]) -> TensorSpec:
    shape = tuple(int(size) for size in item["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return TensorSpec(DTYPES[item["dtype"]], shape)


class TensorReader:
    """Lazy access to the tensors of one file, or of all shards of an ``.index.json``.

    Use as a context manager. ``specs`` maps every name to its dtype and shape, ``metadata`` is the
    metadata of the (first) file, and ``reader[name]`` loads one tensor.

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
        for file in self.files:
            header = read_header(file)
            self.metadata = self.metadata or header.metadata
            if repeated := self.specs.keys() & header.specs.keys():
                raise TensorFileError(f"{self.path.name}: in two shards: {_listing(repeated)}")
            self.specs.update(header.specs)
            self.file_of.update(dict.fromkeys(header.specs, file))
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        """Return the reader; files are opened when a tensor of theirs is asked for."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all files."""
        self._handles.clear()
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""
        file = self.file_of[name]
        if file not in self._handles:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                self._handles[file] = self._stack.enter_context(handle)
            except SafetensorError as error:
                raise TensorFileError(f"{file.name} cannot be read: {error}") from error
        tensor: Tensor = self._handles[file].get_tensor(name)
        return tensor


def shard_files(path: Path) -> list[Path]:
    """The safetensors files behind ``path``: itself, or the shards that its index names."""
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise TensorFileError(f"{path.name} is not an index of shards: {error!r}") from error
    if bad := [name for name in names if Path(name).name != name]:
        raise TensorFileError(f"{path.name} names shards outside its folder: {_listing(bad)}")
    files = [path.parent / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise TensorFileError(f"{path.name}: missing shards: {_listing(missing)}")
    return files


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one file atomically, asking ``load(name)`` for one tensor at a time.

    Tensors are ordered by descending item size, then by name: every tensor stays aligned.

    Raises:
        TensorFileError: If a tensor differs from its spec, or the reopened file from the intended.
        DiskFullError: If the disk fills up. A file that was at ``path`` is untouched.
    """
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    with atomic_file(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(_encode_header(order, specs, metadata or {}))
            for name in order:
                _write_one(file, name, specs[name], load(name))
            _flush_to_disk(file)
        header = read_header(temporary)
        if header.specs != dict(specs) or header.metadata != dict(metadata or {}):
            raise TensorFileError(f"{path.name} did not read back as it was written")
    return path


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a dict of tensors atomically; raises as ``write_tensors`` does."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return write_tensors(path, specs, tensors.__getitem__, metadata)


def save_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_file(path) as temporary, open(temporary, "xb") as file:
        file.write(text.encode("utf-8"))
        _flush_to_disk(file)
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it onto ``path`` if the block succeeds.

    If it does not, the temporary file is removed and ``path`` is left as it was.

    Raises:
        DiskFullError: In place of the ``OSError`` of a full disk or quota.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def disk_full(path: Path) -> DiskFullError:
    """The one-line error for a disk that filled up while ``path`` was written."""
    kept = "the file that was there is unchanged" if path.exists() else "no file was left behind"
    return DiskFullError(
        errno.ENOSPC, f"the disk is full: {path.name} could not be written; {kept}"
    )


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
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_one(file: IO[bytes], name: str, spec: TensorSpec, tensor: Tensor) -> None:
    if TensorSpec.of(tensor) != spec:
        raise TensorFileError(
            f"{name}: expected {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.numel():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(raw.numpy().data)


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _listing(names: Any) -> str:
    return ", ".join(sorted(names)[:10])
