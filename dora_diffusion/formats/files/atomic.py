"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

from dora_diffusion import system

_SYNCED_BYTES = 2**26
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


class DiskFullError(OSError):
    """Error for a disk that is full. An existing file is unchanged."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name next to ``path``, and rename it to ``path`` after the block.

    If the block fails, the temporary file and folders that were created for it are removed, and
    ``path`` is unchanged.

    Raises:
        DiskFullError: If the disk or quota is full, instead of the ``OSError``.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
        system.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary, new_folders)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        if error.errno == errno.EFBIG:
            raise OSError(
                errno.EFBIG,
                f"{path.name} would be larger than this disk or account allows a file to be (4 GB "
                f"on a disk formatted as FAT32); {_kept(path)}",
            ) from error
        if system.is_in_use(error):
            text = f"{path.name} is open in another program, which must close it first"
            raise PermissionError(errno.EACCES, f"{text}; {_kept(path)}") from error
        if error.filename == str(temporary):
            error.filename = str(path)  # The name that the user knows.
        raise
    except BaseException:
        _remove(temporary, new_folders)
        raise


def leftovers(folder: Path) -> list[Path]:
    """Return temporary files of `atomic_file`, of processes that were killed or still write."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def _remove(temporary: Path, folders: Iterable[Path]) -> None:
    """Remove a temporary file, and the folders that were created for it if they are empty."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()


def require_writable(path: Path, *, is_folder: bool = False) -> None:
    """Check before a long operation that its result can be written.

    Args:
        path: The file. Its folder may not exist yet.
        is_folder: Whether the path is a folder for files.

    Raises:
        OSError: If the path is a folder, its folder is a file, or the folder cannot be written to.
    """
    if not is_folder and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of a file", str(path))
    folders = [path, *path.parents] if is_folder else path.parents
    existing = next(folder for folder in folders if os.path.lexists(folder))
    if not existing.is_dir():
        text = "is not a folder; give another output"
        raise NotADirectoryError(errno.ENOTDIR, text, str(existing))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"nothing can be written there ({error.strerror}); give another output"
        raise OSError(error.errno, reason, str(existing)) from error


def disk_full(path: Path) -> DiskFullError:
    """Return the error for a disk that is full."""
    text = f"the disk is full: {path.name} could not be written; {_kept(path)}"
    return DiskFullError(errno.ENOSPC, text)


def _kept(path: Path) -> str:
    return "the file that was there is unchanged" if path.exists() else "no file was left behind"


def save_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_file(path) as temporary, SyncedFile(temporary) as file:
        file.write(text.encode("utf-8"))
    return path


class SyncedFile:
    """New file that is synced to the disk when it is closed. Use as a context manager.

    A large file is synced while it is written, and synced data are dropped from the system's cache.
    Otherwise a model of several gigabytes would evict everything else from the cache, and writing
    would spend most of its time on freeing memory.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._pool = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNCED_BYTES:
            self._wait()
            self._file.flush()
            self._syncing = self._pool.submit(_sync_and_drop, self._file.fileno())
            self._unsynced = 0

    def replace_start(self, data: bytes) -> None:
        """Overwrite the first bytes."""
        self._file.seek(0)
        self._file.write(data)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def __enter__(self) -> SyncedFile:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Sync, unless writing failed, and close the file."""
        try:
            if kind is None:
                self._wait()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._pool.shutdown()
            self._file.close()


def _sync_and_drop(handle: int) -> None:
    os.fsync(handle)
    system.drop_from_cache(handle)


def _sync_folder(folder: Path) -> None:
    # Makes the rename durable. Not every system can open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
