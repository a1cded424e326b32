"""The runs folder: its layout, and the conversion of untrusted ids to paths.

::

    runs/
      <job id>/      one job (see `dora_diffusion.studio.jobs.records`)
      subjects/<id>/ photos, captions and masks of a subject
      images/        generated images (see `dora_diffusion.studio.jobs.image_store`)
      exports/<id>/  converted adapters and merged checkpoints, for download
      cache/         Gradio's uploads
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion import system
from dora_diffusion.formats.files.runs import file_stem

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}(-[a-z0-9-]{1,40})?")
_LEFTOVER = re.compile(rf"\.(new|deleted)-{_ID.pattern}")
_LONGEST = 40
_DAY = 24 * 3600
GONE = "(no longer in this list: choose another)"
"""Value and label of a choice whose object was deleted; never an id or a file name."""
_COUNT = itertools.count(secrets.randbelow(0x1000))
REMAINS = "; files that could not be deleted yet are deleted at the next start of the app"


class UserError(ValueError):
    """Error for a request that cannot be served: one plain line with the fix."""


class Withdrawn(UserError):
    """Cancellation of a request by its user; not a failure."""


class MissingError(UserError):
    """Error for a run, subject or file that does not exist, or was deleted."""


class DamagedFile(UserError):
    """Error for a file of the runs folder that cannot be read or has invalid contents."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path.name} is damaged ({reason}); fix or delete it")


class _Below:
    """Path below the runs folder, as a property of `Workspace`."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __get__(self, workspace: Workspace, _: object) -> Path:
        return workspace.root.joinpath(*self._names)


@dataclass(frozen=True)
class Workspace:
    """The runs folder.

    Attributes:
        root: Its path.
        subjects: Folder of subjects.
        images: Folder of generated images.
        inputs: Folder of the input images and masks of inpainting and image-to-image.
        thumbnails: Folder of small JPEGs of generated images.
        exports: Folder of files for download.
        cache: Folder of Gradio's uploads.
        device_lock: Lock on the compute device, held by a worker or the Generate tab.
        queue_lock: Lock of the app that starts jobs.

    Example:
        >>> Workspace(Path("runs")).images.as_posix()
        'runs/images'
    """

    root: Path
    subjects = _Below("subjects")
    images = _Below("images")
    inputs = _Below("images", "inputs")
    thumbnails = _Below("images", "thumbnails")
    exports = _Below("exports")
    cache = _Below("cache")
    device_lock = _Below(".device.lock")
    queue_lock = _Below(".queue.lock")

    def make(self) -> Workspace:
        """Create the folders."""
        for folder in (
            self.root, self.subjects, self.images, self.inputs, self.thumbnails,
            self.exports, self.cache,
        ):  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def remove_leftovers(self) -> list[Path]:
        """Remove partly written and partly deleted folders, and old uploads, after a crash.

        Returns:
            The paths that could not be removed.
        """
        left = [
            Path(entry)
            for folder in (self.root, self.subjects, self.exports)
            for entry in os.scandir(folder)
            if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
        # Gradio does not delete its uploads when it exits.
        old = time.time() - _DAY
        uploads = [path for path in self.cache.iterdir() if path.is_dir() and not path.is_symlink()]
        left += [path for path in uploads if path.stat().st_mtime < old]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return [path for path in left if path.exists()]

    def new_job(self, words: str = "") -> Path:
        """Return a folder for a new job. The names of a run and its adapter contain ``words``.

        Renaming a run changes its title but not its folder, whose name is in images and downloads.
        """
        name, stem = new_id(), file_stem(words, "adapter")[:_LONGEST].rstrip("-")
        return self.root / (f"{name}-{stem}" if words else name)

    def ranking(self, run_id: str) -> Path:
        """Return the folder of a run's checkpoint ranking; deleted with the run's exports."""
        return self.exports / run_id / "comparison"

    @property
    def job_folders(self) -> list[Path]:
        """Folders of all jobs, oldest first."""
        return [self.root / job for job in ids_in(self.root)]

    def job(self, job_id: object) -> Path:
        """Return the folder of a job.

        Raises:
            UserError: If the job does not exist.
        """
        return look_up(self.root, job_id, "run")

    def subject(self, subject_id: object) -> Path:
        """Return the folder of a subject.

        Raises:
            UserError: If the subject does not exist.
        """
        return look_up(self.subjects, subject_id, "subject")


def new_id() -> str:
    """Create an id from date, time and six hex digits. Ids sort by age.

    Three of the digits are the fraction of the second. The other three count up from a random
    number, so that ids of one process are unique.
    """
    now = time.time()
    part = int(now % 1 * 0x1000)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{stamp}-{part:03x}{next(_COUNT) % 0x1000:03x}"


def made_at(job_id: str) -> str:
    """Return the date and time of an id: ``2026-11-25 16:03``."""
    return f"{job_id[:4]}-{job_id[4:6]}-{job_id[6:8]} {job_id[9:11]}:{job_id[11:13]}"


def is_id(name: object) -> bool:
    """Return whether a name has the form of an id; its object need not exist."""
    return isinstance(name, str) and bool(_ID.fullmatch(name))


def ids_in(folder: Path) -> list[str]:
    """Return the ids in a folder, oldest first. Links and other names are ignored."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if _ID.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    )


def look_up(folder: Path, name: object, what: str) -> Path:
    """Return the subfolder of an id. Ids are compared with existing names, never just joined.

    Raises:
        MissingError: If the subfolder does not exist.
    """
    if isinstance(name, str) and name in ids_in(folder):
        return folder / name
    raise MissingError(f"this {what} no longer exists; choose another one")


def confined(folder: Path, name: object) -> Path:
    """Return a file of a folder by its bare name, once its links are resolved.

    Raises:
        MissingError: If no file inside the folder has this name.
    """
    if isinstance(name, str) and name in os.listdir(folder):
        path = (folder / name).resolve()
        if path.is_file() and path.parent == folder.resolve():
            return folder / name
    raise MissingError("this file no longer exists; choose another one")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically: a reader sees either the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    system.replace(temporary, path)


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist.

    Raises:
        DamagedFile: If the file cannot be read, or does not contain an object.
    """
    try:
        value = json.loads(system.patiently(lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFile(path, error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(path, "it is not JSON") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, "it is not JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        return read_object(path) or {}
    except DamagedFile:
        return {}


def remove_folder(folder: Path) -> bool:
    """Delete a folder. It is renamed first, so that a partly deleted folder is never shown.

    Returns:
        Whether everything was deleted. `Workspace.remove_leftovers` deletes the rest later.

    Raises:
        UserError: If Windows refuses because a file in the folder is open.
    """
    doomed = folder.with_name(f".deleted-{folder.name}")
    try:
        system.replace(folder, doomed)
    except PermissionError as error:
        if not system.is_in_use(error):
            raise
        raise UserError(
            f"{folder} cannot be deleted while a program has a file of it open; close it, or try "
            "again in a moment"
        ) from error
    shutil.rmtree(doomed, ignore_errors=True)
    return not doomed.exists()


def clean_text(text: object, limit: int, what: str) -> str:
    """Return a user's text as one line without control characters.

    Raises:
        UserError: If the line is longer than ``limit`` characters.
    """
    line = "".join(c if c.isprintable() else " " for c in str(text or ""))
    line = " ".join(line.split())
    if len(line) > limit:
        raise UserError(f"the {what} has {len(line)} characters; at most {limit} are taken")
    return line
