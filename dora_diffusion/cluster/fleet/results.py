"""Records of a fleet's subjects, and storage of their results in a folder or at an fsspec URL.

With a URL, a worker trains in a local folder and copies the results. A copy gets its final name
once it is complete, and a subject's record is copied last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dora_diffusion import system
from dora_diffusion.cli.console.errors import explain
from dora_diffusion.config import ConfigError, TrainConfig, differences, settings
from dora_diffusion.config.derived import listed
from dora_diffusion.config.train import photo_folders
from dora_diffusion.config.wording import counted, duration
from dora_diffusion.data.images import digest_of
from dora_diffusion.data.photos import COMPANIONS, PHOTO_SUFFIXES
from dora_diffusion.evaluation.report import LinkedImage, Section, as_html
from dora_diffusion.formats.files.atomic import require_writable, save_text
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.results.folders import locked

RECORD_FILE = "fleet.json"
"""Record file in each subject's folder, written last."""
RECORDS_FILE = "fleet.jsonl"
"""Records of all subjects, one per line."""
DONE, FAILED, RUNNING = "done", "failed", "running"
_LONG = 300


PAGE_FILE = "index.html"
# Sheets of a subject to show on the page, the first that exists.
_SHEETS = ("samples/base_above_adapted.png", "samples/adapted.png")
_STATE_FILE = "state.tar"
# File in the state with the names of its checkpoints.
_CHECKPOINTS = ".checkpoints"


@dataclass(frozen=True)
class SubjectRecord:
    """Outcome and cost of a subject.

    Attributes:
        name: Name of the subject.
        status: ``"done"``, ``"failed"`` or ``"running"``.
        cause: Reason of a failure, in one line.
        attempts: Number of workers that had the subject.
        worker: The last worker; ``node`` is its node.
        seconds: Time from the first worker to the end.
        start_seconds: Time until the first step on the last worker, with the start of the worker if
            this is its first task.
        train_seconds: Time from the first step to the end.
        cpu_seconds: Processor time on the last worker; in a pack, the subject's share.
        steps: Optimizer steps.
        peak_bytes: Peak memory of the last worker so far: of its GPU, or of its process.
        pack: Number of subjects trained at once.
        samples: Sheets of sample images in the subject's folder.
        warnings: Warnings of the training.
        digest: Digest of settings and photos.
        settings: Settings of the training.
        run: Id of the fleet run that started the subject.
    """

    name: str
    status: str
    cause: str = ""
    attempts: int = 0
    worker: str = ""
    node: str = ""
    seconds: float = 0.0
    start_seconds: float = 0.0
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: int = 0
    peak_bytes: int = 0
    pack: int = 1
    samples: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    digest: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""

    def text(self) -> str:
        """Return the text of the record's file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str | None) -> SubjectRecord | None:
        """Parse the text of a record's file; None if it is missing or damaged."""
        known = {source.name for source in dataclasses.fields(cls)}
        try:
            values = {k: v for k, v in json.loads(text or "").items() if k in known}
            lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
            return cls(**{**values, **lists})
        except (ValueError, TypeError, AttributeError):
            return None


def records_text(records: Iterable[SubjectRecord]) -> str:
    """Return the records as JSON lines, without settings."""
    lines = []
    for record in records:
        values = dataclasses.asdict(record)
        del values["settings"], values["run"]
        lines.append(json.dumps(values) + "\n")
    return "".join(lines)


def settings_digest(config: TrainConfig) -> str:
    """Return the digest of everything that affects a result: changed settings, and the photos."""
    names = [setting.name for setting in settings() if setting.resume != "ignored"]
    values, defaults = config.to_dict(), TrainConfig().to_dict()
    moved = {name: values[name] for name in names if values[name] != defaults[name]}
    contents = []
    for subject in config.subjects:
        contents += [_contents(folder) for folder in photo_folders(subject).values()]
    text = json.dumps([moved, contents])
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(folder: str) -> list[list[str]]:
    """Return names and digests of a folder's photos with captions and masks."""
    top = Path(folder).expanduser()
    return [
        [path.relative_to(top).as_posix(), digest_of(path.read_bytes())]
        for path in sorted(top.glob("*"))
        if path.name.lower().endswith((*PHOTO_SUFFIXES, *COMPANIONS)) and path.is_file()
        if not path.name.startswith(".")
    ]


def done_before(
    stored: SubjectRecord | None, record: SubjectRecord, config: TrainConfig
) -> SubjectRecord | None:
    """Return the record of a done subject; None if the subject must be trained.

    Args:
        stored: The stored record, if any.
        record: The initial record of a new training.
        config: Settings of the subject.

    Raises:
        ConfigError: If the subject was trained with other settings.
    """
    if stored is None or stored.status != DONE:
        return None
    if config.overwrite_output_dir and stored.run != record.run:
        return None
    if stored.digest != record.digest:
        refused, allowed = differences(stored.settings, config)
        moved = {**refused, **allowed}
        changes = listed(moved) if moved else "other photos or captions"
        raise ConfigError(
            f"it is trained already, with other settings: {changes}; take them "
            "back, give another output, or train it again with --overwrite_output_dir"
        )
    return stored


def cause_of(error: Exception) -> str:
    """Return an error in one line, with its type if it is not a user's mistake."""
    text = explain(error, "train")[1] or f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= _LONG else f"{text[:_LONG].rstrip()} ..."


class FleetResults:
    """Storage of a fleet: a folder for each subject, the records and the page.

    Args:
        output: A folder, or an fsspec URL such as ``s3://bucket/shop``.

    Raises:
        ConfigError: If the URL's file system is unknown or cannot be reached.
        OSError: If the folder is not writable, or the local folder is not private to this user.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._files: Any = None
        self._top = ""
        self._kept: set[str] = set()  # checkpoints stored at the URL
        if "://" not in output:
            self._root = Path(output).expanduser()
            require_writable(self._root, is_folder=True)
            return
        import fsspec

        try:
            self._files, self._top = fsspec.core.url_to_fs(output)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"output {output}: {' '.join(str(error).split())}", "output"
            ) from error
        # The same local folder for all workers of a machine, so that a lost worker's is removed.
        digest = hashlib.sha256(output.encode()).hexdigest()[:12]
        self._root = system.private_folder(f"fleet-{digest}")

    def locked(self) -> AbstractContextManager[None]:
        """Lock the results against other fleets on this machine or with this folder.

        Raises:
            ConfigError: If another fleet holds the lock.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        return locked(self._root, f"output {self.output}")

    def read(self, name: str) -> str | None:
        """Read a text file; None if it does not exist."""
        try:
            if self._files is None:
                return (self._root / name).read_text(encoding="utf-8")
            text: str = self._files.cat_file(f"{self._top}/{name}").decode("utf-8")
            return text
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, text: str) -> str:
        """Write a text file atomically. Returns its path or URL."""
        if self._files is None:
            return str(save_text(self._root / name, text))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "text")
            file.write_text(text, encoding="utf-8")
            self._copy(file, name)
        return f"{self.output.rstrip('/')}/{name}"

    def folder(self, subject: str) -> Path:
        """Return the local folder of a subject."""
        return self._root / subject

    def record(self, subject: str) -> SubjectRecord | None:
        """Return the record of a subject."""
        return SubjectRecord.parse(self.read(f"{subject}/{RECORD_FILE}"))

    def records(self) -> dict[str, SubjectRecord]:
        """Return the records of the last call by name, without settings."""
        lines = (self.read(RECORDS_FILE) or "").splitlines()
        return {record.name: record for line in lines if (record := SubjectRecord.parse(line))}

    def save(self, record: SubjectRecord) -> None:
        """Write a subject's record, which marks its folder as this fleet's or as complete."""
        self.write(f"{record.name}/{RECORD_FILE}", record.text())
        state = f"{self._top}/{record.name}/{_STATE_FILE}"
        if record.status == DONE and self._files is not None and self._files.exists(state):
            self._files.rm_file(state)

    def fetch(self, subject: str) -> None:
        """Fetch an earlier worker's state of a subject from the URL."""
        if self._files is None:
            return
        folder = self.folder(subject)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source = f"{self._top}/{subject}"
        if not self._files.exists(f"{source}/{_STATE_FILE}"):
            return
        state = self._files.open(f"{source}/{_STATE_FILE}", "rb")
        with state as file, tarfile.open(fileobj=file) as tar:
            _unpack(tar, folder)
        listed = folder / _CHECKPOINTS
        self._kept = set(listed.read_text(encoding="utf-8").split())
        listed.unlink()
        for name in self._kept:
            for path in self._files.find(f"{source}/{name}"):
                target = folder / name / path.rpartition(f"/{name}/")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(target))

    def clear(self, subject: str) -> None:
        """Delete a subject's results at the URL before it is trained again."""
        if self._files is not None and self._files.exists(f"{self._top}/{subject}"):
            self._files.rm(f"{self._top}/{subject}", recursive=True)

    def keep(self, subject: str, folder: Path) -> None:
        """Copy new checkpoints to the URL, then the other files needed to resume from them."""
        names = set() if self._files is None else {path.name for path in checkpoints_in(folder)}
        new = names - self._kept
        if not new:
            return
        for name in sorted(new):
            self._copy_all(sorted((folder / name).rglob("*")), subject, folder)
        with tempfile.TemporaryDirectory(dir=self._root) as temporary:
            listed, file = Path(temporary, _CHECKPOINTS), Path(temporary, _STATE_FILE)
            listed.write_text(" ".join(names), encoding="utf-8")
            with tarfile.open(file, "w") as tar:
                tar.add(listed, _CHECKPOINTS)
                for path in sorted(folder.iterdir()):
                    if not path.name.startswith((".", "checkpoint-")):
                        tar.add(path, path.name)
            self._copy(file, f"{subject}/{_STATE_FILE}")
        for name in self._kept - names:
            self._files.rm(f"{self._top}/{subject}/{name}", recursive=True)
        self._kept = names

    def publish(self, subject: str, folder: Path) -> None:
        """Copy all results of a subject to the URL."""
        if self._files is not None:
            top = {path: path.relative_to(folder).parts[0] for path in sorted(folder.rglob("*"))}
            self._copy_all(
                [p for p, name in top.items() if name not in self._kept], subject, folder
            )

    def _copy_all(self, paths: Iterable[Path], subject: str, folder: Path) -> None:
        """Copy files, except hidden ones, to the subject's folder at the URL."""
        for path in paths:
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                self._copy(path, f"{subject}/{name.as_posix()}")

    def leave(self, subject: str) -> None:
        """Delete the local folder of a subject that is stored at the URL."""
        if self._files is not None:
            shutil.rmtree(self.folder(subject), ignore_errors=True)

    def _copy(self, file: Path, name: str) -> None:
        """Copy a file to the URL under a temporary name, then rename it."""
        final = f"{self._top}/{name}"
        folder, _, last = final.rpartition("/")
        self._files.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{last}.part"
        self._files.put_file(str(file), partial)
        self._files.mv(partial, final)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Extract the files and folders of a tar.

    `tarfile` has a filter for this only since Python 3.10.12 and 3.11.4.

    Raises:
        ConfigError: If a member is not a file or folder, or would be outside of ``folder``.
    """
    for member in tar:
        target, content = folder / member.name, tar.extractfile(member) if member.isfile() else None
        is_below = Path(os.path.normpath(target)).is_relative_to(folder)
        if not is_below or (content is None and not member.isdir()):
            raise ConfigError(
                f"{_STATE_FILE} of the fleet's output holds {member.name!r}, which no fleet "
                "writes; find out who else writes there, and remove the subject's folder there to "
                "train it again"
            )
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)


def fleet_page(names: Sequence[str], records: Mapping[str, SubjectRecord]) -> str:
    """Return the page as HTML, with links to the images in the subjects' folders.

    Args:
        names: Names of all subjects, in order.
        records: Records of the ended subjects.
    """
    ended = [records[name] for name in names if name in records]
    done = [record for record in ended if record.status == DONE]
    failed = [record for record in ended if record.status == FAILED]
    text = f"{counted(len(names), 'subject')}: {len(done)} done, {len(failed)} failed."
    if done:
        seconds = sum(record.seconds for record in done)
        cpu = sum(record.cpu_seconds for record in done)
        text += (
            f" On average, a finished subject took {duration(seconds / len(done))}, with "
            f"{duration(cpu / len(done))} of processor time."
        )
    table = [["subject", "status", "steps", "time", "start", "processor time", "workers", "node"]]
    table += [
        [
            record.name, record.status, str(record.steps), duration(record.seconds),
            f"{record.start_seconds:.1f} s", duration(record.cpu_seconds), str(record.attempts),
            record.node or "-",
        ]
        for record in ended
    ]  # fmt: skip
    sections = [Section("Subjects", text, table)]
    if failed:
        causes = [["subject", "cause"], *([record.name, record.cause] for record in failed)]
        sections.insert(0, Section("Failed", table=causes))
    sheets = {r.name: next((s for s in _SHEETS if s in r.samples), None) for r in done}
    images = [
        LinkedImage(name, quote(f"{name}/{sheet}")) for name, sheet in sheets.items() if sheet
    ]
    if images:
        sections.append(Section("Images", images=images))
    return as_html("A fleet", sections)
