"""The adapters that may be asked for, by name: what lies in some folders."""

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
"""Seconds for which a name that was not found is not looked for again."""
MOST_MISSING = 16
"""Names that are looked for in that time; others wait."""


class Catalogue:
    """Adapter files and runs' folders, by name; only these are ever opened.

    A folder with an adapter is called by its name, a file by its own without ``.safetensors``: with
    it where a folder beside it has that name, as what was converted for another program may. What
    is asked for is looked up among these names, and never made a path of. Folders may change at any
    moment, and a folder that cannot be read has a name too: whoever opens it learns why.

    Args:
        folders: Adapter files, runs' folders, or folders of these.
        clock: Seconds.

    Attributes:
        twins: Files that are not served, each with the one that is served by its name.

    Raises:
        ConfigError: If a folder is not there.
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
        """Rescan the folders; of two adapters with one name, the one that was there first stays."""
        named: dict[str, list[Path]] = {}
        found = dict.fromkeys(f for folder in self._folders for f in _adapters_in(folder))
        for file in found:
            is_file = file.suffix == ".safetensors"
            name = file.stem if is_file and file.with_suffix("") not in found else file.name
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
        """The adapter of a name, which may have come just now; None if there is none."""
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
        """Return the metadata of an adapter file that was found.

        Raises:
            AdapterFormatError, OSError: If it cannot be read.
            FileNotFoundError: If it has gone since.
        """
        _require_readable(file)
        return read_metadata(file)


def twin_problem(name: str, folder: str | Path) -> str:
    """Describe why an adapter is not served whose name another one has."""
    return f"there is another {name} in {folder}; rename one of them"


def _require_readable(path: Path) -> None:
    """Check that a file or folder can be opened, of which `Path.glob` says nothing.

    Raises:
        PermissionError: If it cannot.
    """
    mode = os.R_OK | (os.X_OK if path.is_dir() else 0)
    if os.path.lexists(path) and not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _adapters_in(folder: Path) -> Iterator[Path]:
    """Adapter files and folders with one, of a folder, or the folder itself.

    What cannot be read is among them.
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
            continue  # Photos, a model, a run that has not written its adapter; or it has gone.
        except OSError:
            pass
        yield entry
