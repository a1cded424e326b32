"""The available adapters by name, from some folders."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dora_diffusion.config.fields import require
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.stored import find_adapter, read_metadata
from dora_diffusion.formats.layouts.dotted import DIFFUSERS

_LOG = logging.getLogger("dora_diffusion.cluster.serving")

RESCAN = 5.0
"""Seconds before an unknown name is searched again."""
MOST_MISSING = 16
"""Most unknown names to search in that time."""


class Catalogue:
    """Adapter files and run folders by name; only these are ever opened.

    The name of a folder with an adapter is the folder's name. The name of a file is its name
    without ``.safetensors``, or with it if a folder next to it has the same name, such as a
    conversion for another program. Requested names are looked up here and never joined to a path.
    Folders may change at any time. An unreadable folder is listed too, and opening it raises the
    error.

    Args:
        folders: Adapter files, run folders, or folders of these.
        clock: Returns the time in seconds.

    Attributes:
        twins: Adapters that are not served -> (name, adapter that is served under the name).

    Raises:
        ConfigError: If a folder does not exist.
        PermissionError: If a folder cannot be read.
    """

    def __init__(
        self, folders: Sequence[str | Path], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folders, self._clock = [Path(folder).expanduser() for folder in folders], clock
        for folder in self._folders:
            require(
                folder.exists(), f"{folder} does not exist; give a folder of adapters", "adapters"
            )
            _require_readable(folder)
        self._files: dict[str, Path] = {}
        self._missing: dict[str, float] = {}
        self.twins: dict[Path, tuple[str, Path]] = {}
        self.scan()

    def scan(self) -> dict[str, Path]:
        """Rescan the folders. If two adapters have the same name, the earlier one is kept."""
        named: dict[str, list[Path]] = {}
        adapters = dict.fromkeys(f for folder in self._folders for f in _adapters_in(folder))
        for file in adapters:
            is_file = file.suffix == ".safetensors"
            name = file.stem if is_file and file.with_suffix("") not in adapters else file.name
            named.setdefault(name, []).append(file)
        files: dict[str, Path] = {}
        twins: dict[Path, tuple[str, Path]] = {}
        for name, same in named.items():
            before = self._files.get(name)
            files[name] = before if before in same else same[0]
            if before not in (None, files[name]):
                _LOG.warning("adapter %r is %s now; it was %s", name, files[name], before)
            twins |= {file: (name, files[name]) for file in same if file != files[name]}
        for file in twins.keys() - self.twins.keys():
            name, served = twins[file]
            _LOG.warning("%s is not served: %s", file, twin_problem(name, served.parent))
        self._files, self.twins = files, twins
        return files

    def find(self, name: str) -> Path | None:
        """Return the adapter of a name, even if it is new; None if it does not exist."""
        file = self._files.get(name)
        if file is not None and os.path.lexists(file):
            return file
        now = self._clock()
        self._missing = {one: at for one, at in self._missing.items() if now - at < RESCAN}
        if name not in self._missing and len(self._missing) < MOST_MISSING:
            file = self.scan().get(name)
            if file is not None:
                return file
            self._missing[name] = now
        return None

    @staticmethod
    def metadata(file: Path) -> AdapterMetadata:
        """Return the metadata of an adapter file.

        Raises:
            AdapterFormatError, OSError: If the file cannot be read.
            FileNotFoundError: If the file was deleted.
        """
        _require_readable(file)
        return read_metadata(file)


def twin_problem(name: str, folder: str | Path) -> str:
    """Return the reason for not serving an adapter with the same name as another one."""
    return f"there is another {name} in {folder}; rename one of them"


def _require_readable(path: Path) -> None:
    """Check that a file or folder can be opened, which `Path.glob` does not report.

    Raises:
        PermissionError: If it cannot be opened.
    """
    mode = os.R_OK | (os.X_OK if path.is_dir() else 0)
    if os.path.lexists(path) and not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _adapters_in(folder: Path) -> Iterator[Path]:
    """Yield a folder if it is an adapter, else the adapter files and adapter folders in it.

    Unreadable entries are included.
    """
    try:
        _require_readable(folder)
        is_adapter = folder.is_file() or (folder / DIFFUSERS.file_name).is_file()
        entries = [] if is_adapter else sorted(folder.iterdir())
    except OSError:
        is_adapter, entries = True, []
    if is_adapter:
        yield folder
    for entry in entries:
        try:
            if entry.is_dir():
                _require_readable(entry)
                find_adapter(entry)
            elif entry.suffix != ".safetensors" or not entry.is_file():
                continue
        except (ValueError, FileNotFoundError, NotADirectoryError):
            continue  # Photos, a model, a run without an adapter so far, or a deleted folder.
        except OSError:
            pass
        yield entry
