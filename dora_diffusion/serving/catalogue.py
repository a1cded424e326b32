"""The adapters that may be asked for, by name: what lies in some folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dora_diffusion.config.fields import require
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.stored import find_adapter, read_metadata
from dora_diffusion.formats.layouts.diffusers import DIFFUSERS

RESCAN = 5.0
"""Seconds for which a name that is not known is not looked for again."""


class Catalogue:
    """Adapter files and runs' folders, by name; only these are ever opened.

    A folder with an adapter is called by its name, a file by its own without ``.safetensors``: with
    it where a folder beside it has that name, as what was converted for another program may. What
    is asked for is looked up among these names, and never made a path of.

    Args:
        folders: Adapter files, runs' folders, or folders of these.
        clock: Seconds.

    Raises:
        ConfigError: If a folder is not there, or two adapters have one name.
    """

    def __init__(
        self, folders: Sequence[str | Path], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folders, self._clock = [Path(folder).expanduser() for folder in folders], clock
        for folder in self._folders:
            require(folder.exists(), f"{folder} does not exist; give a folder of adapters")
        self._files: dict[str, Path] = {}
        self._scanned = -RESCAN
        self.scan(strict=True)

    def scan(self, *, strict: bool = False) -> dict[str, Path]:
        """Look again; of two adapters with one name, the one that was there first stays.

        Raises:
            ConfigError: If there are two, and the look is ``strict``.
        """
        files: dict[str, Path] = {}
        found = dict.fromkeys(f for folder in self._folders for f in _adapters_in(folder))
        for file in found:
            is_file = file.suffix == ".safetensors"
            name = file.stem if is_file and file.with_suffix("") not in found else file.name
            require(
                name not in files or not strict,
                f"{file} and {files.get(name)} have one name; rename one of them",
            )
            if name not in files or self._files.get(name) == file:
                files[name] = file
        self._files, self._scanned = files, self._clock()
        return files

    def find(self, name: str) -> Path | None:
        """The adapter of a name; None if there is none."""
        is_known = name in self._files and self._files[name].exists()
        if not is_known and self._clock() - self._scanned >= RESCAN:
            self.scan()
        file = self._files.get(name)
        return file if file is not None and file.exists() else None

    def metadata(self, name: str) -> AdapterMetadata:
        """What the file of an adapter that was found says of it.

        Raises:
            AdapterFormatError: If it cannot be read.
        """
        return read_metadata(self._files[name])


def _adapters_in(folder: Path) -> Iterator[Path]:
    """Adapter files and folders with one, of a folder, or the folder itself."""
    if folder.is_file() or (folder / DIFFUSERS.file_name).is_file():
        yield folder
        return
    for entry in sorted(folder.iterdir()):
        if entry.suffix == ".safetensors" and entry.is_file():
            yield entry
        elif entry.is_dir():
            try:
                find_adapter(entry)
            except ValueError:
                continue  # Photos, a model, or a run that has not written its adapter.
            yield entry
