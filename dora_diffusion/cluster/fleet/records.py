"""Records of a fleet's subjects, and the digest that identifies a finished one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, differences, settings
from dora_diffusion.config.derived import listed
from dora_diffusion.data.images import digest_of
from dora_diffusion.data.photos import COMPANIONS, PHOTO_SUFFIXES
from dora_diffusion.training.results.metrics import TrainingError

RECORD_FILE = "fleet.json"
"""Record file in each subject's folder, written last."""
RECORDS_FILE = "fleet.jsonl"
"""All subjects, one a line."""
DONE, FAILED, RUNNING = "done", "failed", "running"
_LONG = 300


@dataclass(frozen=True)
class SubjectRecord:
    """Outcome and cost of a subject.

    Attributes:
        name: The subject.
        status: ``"done"``, ``"failed"``, or ``"running"``: begun, and not ended yet.
        cause: Why it failed, in a line.
        attempts: Workers that had it.
        worker: The last of them, and ``node`` where that is.
        seconds: From its first worker until its end.
        start_seconds: From its last worker, or that worker's start where it is the first task
            there, until the first step.
        train_seconds: From there until its end.
        cpu_seconds: Processor time of its last worker; its share, where several train as a pack.
        steps: Optimizer steps.
        peak_bytes: Most memory that its worker has held so far: of a GPU, or of the process.
        read_bytes: Read by its last worker; a base model that is mapped is not counted.
        written_bytes: The same, written.
        pack: How many subjects were trained at once.
        samples: Its sheets of sample images, in its folder.
        warnings: What the training warned of.
        digest: Of settings and photos.
        settings: Of the training.
        run: The call of the fleet that began it.
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
    read_bytes: int = 0
    written_bytes: int = 0
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
        """Parse the text of a record's file; None where there is none, or it is damaged."""
        known = {source.name for source in dataclasses.fields(cls)}
        try:
            values = {k: v for k, v in json.loads(text or "").items() if k in known}
            lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
            return cls(**{**values, **lists})
        except (ValueError, TypeError, AttributeError):
            return None


def records_text(records: Iterable[SubjectRecord]) -> str:
    """All records, one a line, without their settings."""
    lines = []
    for record in records:
        values = dataclasses.asdict(record)
        del values["settings"], values["run"]
        lines.append(json.dumps(values) + "\n")
    return "".join(lines)


def settings_digest(config: TrainConfig) -> str:
    """Digest of what a result depends on: settings that are not their default, and the photos."""
    names = [setting.name for setting in settings() if setting.resume != "ignored"]
    values, defaults = config.to_dict(), TrainConfig().to_dict()
    moved = {name: values[name] for name in names if values[name] != defaults[name]}
    contents = []
    for subject in config.subjects:
        words = subject.wildcard_dir if subject.wildcards else None
        folders = [(subject.instance_data_dir, "*"), (subject.validation_data_dir, "*"),
                   (words, "**/*.txt")]  # fmt: skip
        contents += [_contents(folder, pattern) for folder, pattern in folders if folder]
    text = json.dumps([moved, contents])
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(folder: str, pattern: str) -> list[list[str]]:
    """Names and digests of photos and of what lies beside them, or of lists of words."""
    top = Path(folder).expanduser()
    return [
        [path.relative_to(top).as_posix(), digest_of(path.read_bytes())]
        for path in sorted(top.glob(pattern))
        if path.name.lower().endswith((*PHOTO_SUFFIXES, *COMPANIONS)) and path.is_file()
        if not path.name.startswith(".")
    ]


def done_before(
    kept: SubjectRecord | None, record: SubjectRecord, config: TrainConfig
) -> SubjectRecord | None:
    """The record of a subject that is done; None where it is to be trained.

    Args:
        kept: What there is of it.
        record: As it would begin.
        config: Its settings.

    Raises:
        ConfigError: If it is done with other settings.
    """
    if kept is None or kept.status != DONE:
        return None
    if config.overwrite_output_dir and kept.run != record.run:
        return None
    if kept.digest != record.digest:
        raise ConfigError(
            f"it is trained already, with other settings: {changes_text(kept, config)}; take them "
            "back, give another output, or train it again with --overwrite_output_dir"
        )
    return kept


def changes_text(before: SubjectRecord, config: TrainConfig) -> str:
    """Describe how a finished subject's training settings differ, in words."""
    refused, allowed = differences(before.settings, config)
    return listed({**refused, **allowed}) if refused or allowed else "other photos or captions"


def cause_of(error: Exception) -> str:
    """An error in one line; what is not a user's mistake with its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = " ".join(error.strerror.split())
    is_known = isinstance(error, ValueError | OSError | TrainingError)
    text = text if is_known and text else f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONG else f"{text[:_LONG].rstrip()} ..."
