"""Where a fleet keeps everything: a folder that all workers see, or an fsspec URL.

Behind a URL a worker trains in a folder of its own disk, and copies. What is copied appears under
its name when all of it is there, and a subject's record last of all.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError
from dora_diffusion.fleet.records import RECORD_FILE, SubjectRecord
from dora_diffusion.formats.files.atomic import require_writable, save_text
from dora_diffusion.training.checkpoint import checkpoints_in

_STATE_FILE = "state.tar"


class FleetResults:
    """A folder for each subject, and files beside them.

    Args:
        output: A folder, or a URL of a file system that fsspec knows, such as ``s3://bucket/shop``.

    Attributes:
        copied_bytes: Written to a URL so far.

    Raises:
        ConfigError: If no file system of such a URL is known, or it cannot be reached.
        OSError: If nothing can be written to the folder.
    """

    def __init__(self, output: str) -> None:
        self.output, self.copied_bytes = output, 0
        self._files: Any = None
        self._kept: list[Path] = []
        if "://" not in output:
            self._root = Path(output).expanduser()
            require_writable(self._root, is_folder=True)
            return
        import fsspec

        try:
            self._files, self._top = fsspec.core.url_to_fs(output)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"output {output}: {' '.join(str(error).split())}") from error
        # One place for a subject on each machine, so that nothing of a lost worker stays behind.
        digest = hashlib.sha256(output.encode()).hexdigest()[:12]
        self._root = Path(tempfile.gettempdir()) / f"dora-diffusion-fleet-{digest}"

    def read(self, name: str) -> str | None:
        """A text file; None where there is none."""
        try:
            if self._files is None:
                return (self._root / name).read_text(encoding="utf-8")
            text: str = self._files.cat_file(f"{self._top}/{name}").decode("utf-8")
            return text
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, text: str) -> str:
        """Write a text file, which is there as a whole or not at all; returns where that is."""
        if self._files is None:
            return str(save_text(self._root / name, text))
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "text")
            file.write_text(text, encoding="utf-8")
            self._copy(file, name)
        return f"{self.output.rstrip('/')}/{name}"

    def record(self, subject: str) -> SubjectRecord | None:
        """What is kept of a subject."""
        return SubjectRecord.parse(self.read(f"{subject}/{RECORD_FILE}"))

    def begin(self, record: SubjectRecord) -> Path:
        """The folder to train a subject in, with what an earlier worker left of it."""
        folder = self._root / record.name
        if self._files is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            state = f"{self._top}/{record.name}/{_STATE_FILE}"
            if self._files.exists(state):
                with self._files.open(state, "rb") as file, tarfile.open(fileobj=file) as tar:
                    tar.extractall(folder, filter="data")
        self.write(f"{record.name}/{RECORD_FILE}", record.text())
        return folder

    def keep(self, subject: str, folder: Path) -> None:
        """Copy the newest checkpoint to a URL, with all that a run needs to resume from it."""
        newest = [] if self._files is None else checkpoints_in(folder)[-1:]
        if not newest or newest == self._kept:
            return
        with tempfile.TemporaryDirectory(dir=self._root) as place:
            file = Path(place, _STATE_FILE)
            with tarfile.open(file, "w") as tar:
                for path in sorted(folder.iterdir()):
                    is_old = path.name.startswith("checkpoint-") and path not in newest
                    if not is_old and not path.name.startswith("."):
                        tar.add(path, path.name)
            self._copy(file, f"{subject}/{_STATE_FILE}")
        self._kept = newest

    def publish(self, subject: str, folder: Path) -> None:
        """Copy all that was made to a URL."""
        for path in sorted(folder.rglob("*")) if self._files is not None else ():
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                self._copy(path, f"{subject}/{name.as_posix()}")

    def finish(self, record: SubjectRecord) -> None:
        """Write the record that says that all of it is there."""
        self.write(f"{record.name}/{RECORD_FILE}", record.text())
        state = f"{record.name}/{_STATE_FILE}"
        if self._files is not None and self._files.exists(f"{self._top}/{state}"):
            self._files.rm_file(f"{self._top}/{state}")

    def leave(self, subject: str) -> None:
        """Remove what of a subject lies on this disk, where it is kept elsewhere."""
        if self._files is not None:
            shutil.rmtree(self._root / subject, ignore_errors=True)

    def _copy(self, file: Path, name: str) -> None:
        """Copy a file under another name, and move it: a half of one is never taken for it."""
        final = f"{self._top}/{name}"
        folder, _, last = final.rpartition("/")
        self._files.makedirs(folder, exist_ok=True)
        part = f"{folder}/.{last}.part"
        self._files.put_file(str(file), part)
        self._files.mv(part, final)
        self.copied_bytes += file.stat().st_size
