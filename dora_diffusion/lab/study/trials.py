"""One trial of a study: a training with one seed on one subject, and the key of its record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, settings
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.lab.study.config import BASE, Asked, Method, Study
from dora_diffusion.lab.study.subjects import StudySubject

RECORD = 1
"""Version of what a record holds, and of what it is measured with."""

Record = dict[str, Any]
RECORDS_FILE = "records.json"
_SAMPLED = 2**16


@dataclass(frozen=True)
class Trial:
    """Trial, with everything that its record depends on.

    Attributes:
        row: Its method, with the rate where that has several.
        method: Its method; ``"base"`` trains nothing.
        config: Settings of training, but for places, photos and seed.
        subject: What is learned.
        seed: Of the training and of the images that are asked for.
        base: Digest of the model.
        asked: How it is measured.
    """

    row: str
    method: str
    config: TrainConfig
    subject: StudySubject
    seed: int
    base: str
    asked: Asked

    @property
    def learning_rate(self) -> float | None:
        """The UNet's; None of the base."""
        return None if self.method == BASE else self.config.unet_lr

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of training, in full."""
        return {} if self.method == BASE else _compared(self.config.to_dict())

    @property
    def digest(self) -> str:
        """Key of the record: SHA-256 of what it depends on.

        Settings that have their default are left out, so that a setting that a later version adds
        leaves it as it is; `known_record` compares these.
        """
        defaults = _compared(TrainConfig().to_dict())
        moved = {name: v for name, v in self.settings.items() if v != defaults[name]}
        parts = {
            "record": RECORD,
            "is_base": self.method == BASE,
            "base": self.base,
            "settings": moved,
            "subject": self.subject.digest,
            "seed": self.seed,
            "asked": dataclasses.asdict(self.asked),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of its files: what it is in words, and the start of its digest."""
        return f"{self.row}-{self.subject.name}-{self.seed}-{self.digest[:10]}"

    def file(self, output: Path) -> Path:
        """Return the path of its record, by the digest alone, which no method's name is part of."""
        return _record_file(output, self.digest)

    def image(self, output: Path) -> Path:
        """Return the path of its image of the subject."""
        return output / "images" / f"{self.digest[:20]}.png"

    def known_record(self, output: Path) -> Record | None:
        """The record of an earlier call, if it is of this very trial, as this method's."""
        try:
            record: Record = json.loads(self.file(output).read_text(encoding="utf-8"))
            current = self.settings
            same = record["digest"] == self.digest and all(
                current.get(name, value) == value for name, value in record["settings"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return {**record, "row": self.row, "method": self.method} if same else None

    def save(self, output: Path, record: Record) -> Record:
        """Write a record, atomically."""
        _write_record(self.file(output), record)
        return record


def _record_file(output: Path, digest: str) -> Path:
    return output / "records" / f"{digest[:20]}.json"


def _write_record(file: Path, record: Record) -> None:
    save_text(file, json.dumps(record, indent=1) + "\n")


def restore_records(output: Path) -> None:
    """Write the records of a report's one file again, where the folder does not have them.

    Args:
        output: The study's folder, or what is left of it.

    Raises:
        ConfigError: If the file is there and holds no list of records.
    """
    file = output / RECORDS_FILE
    if not file.is_file():
        return
    try:
        records: list[Record] = json.loads(file.read_text(encoding="utf-8"))
        files = [(_record_file(output, str(record["digest"])), record) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} holds no records of a study ({error}); move it away, or take another folder"
        ) from error
    for place, record in files:
        if not place.exists():
            _write_record(place, record)


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that figures depend on: not places, nor what each trial has of its own."""
    left_out = {s.name for s in settings() if s.is_path or s.resume == "ignored"} | {
        "seed", "instance_prompt", "class_word", "validation_prompt", "num_validation_images",
    }  # fmt: skip
    left_out -= {"init_adapter"} if values.get("init_adapter") else set()
    return {name: value for name, value in values.items() if name not in left_out}


def base_digest(base: BaseModel) -> str:
    """Digest of the weights that are trained on: sizes, starts and ends of their files.

    Training changes all of a file, and reading gigabytes before every call would not be worth it.
    """
    digest = hashlib.sha256()
    with open_model(base) as model:
        for file in (file for files in model.files.values() for file in files):
            size = file.stat().st_size
            with file.open("rb") as content:
                digest.update(f"{file.name} {size}".encode() + content.read(_SAMPLED))
                content.seek(max(0, size - _SAMPLED))
                digest.update(content.read())
    return digest.hexdigest()


def trials_of(
    study: Study,
    base: str,
    rates: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[StudySubject, int]],
) -> list[Trial]:
    """Every method with every rate on every pair of subject and seed, pair by pair.

    So a study that is stopped has as many seeds of one method as of another.

    Args:
        study: The study.
        base: Digest of its base.
        rates: Learning rates by method.
        pairs: What is learned, and the seed.
    """
    trials = []
    for subject, seed in pairs:
        trials.append(Trial(BASE, BASE, TrainConfig(), subject, seed, base, study.asked))
        for method in study.methods:
            for row, config in rows_of(study, method, rates.get(method.name, ())):
                trials.append(Trial(row, method.name, config, subject, seed, base, study.asked))
    return trials


def rows_of(study: Study, method: Method, rates: Sequence[float]) -> list[tuple[str, TrainConfig]]:
    """The rows of a method, one for each rate, with their settings."""
    plain = study.training(method)
    configs = [dataclasses.replace(plain, learning_rate=rate) for rate in rates]
    return list(zip(study.rows(method, rates), configs, strict=False))
