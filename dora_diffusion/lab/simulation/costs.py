"""Costs of subjects, as a fleet has measured them or as given, and times of arrival."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.lab.simulation.plan import HOUR
from dora_diffusion.lab.simulation.queue import Values


@dataclass(frozen=True)
class TrainingTimes:
    """Training times of a subject alone on a worker, without its start.

    Attributes:
        mean: Seconds.
        variation: Standard deviation in means: 0 all the same, 1 exponential; drawn from a gamma
            distribution.
        measured: Times to draw from instead.
    """

    mean: float
    variation: float = 0.0
    measured: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        is_valid = math.isfinite(self.mean) and self.mean > 0
        require(is_valid, f"seconds is {self.mean}; it must be greater than 0", "seconds")
        require(
            math.isfinite(self.variation) and self.variation >= 0,
            f"variation is {self.variation}; it must be a number, and not negative",
            "variation",
        )

    @classmethod
    def of(cls, measured: Sequence[float]) -> TrainingTimes:
        """Return the times that were measured."""
        mean = fmean(measured)
        spread = math.sqrt(fmean((value - mean) ** 2 for value in measured))
        return cls(mean, spread / mean, tuple(measured))

    def draw(self, count: int, generator: np.random.Generator) -> Values:
        """Draw so many times, independent of each other."""
        if self.measured:
            return generator.choice(np.asarray(self.measured), count)
        if not self.variation:
            return np.full(count, float(self.mean))
        return generator.gamma(self.variation**-2, self.mean * self.variation**2, count)


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs in the record file of a fleet, in seconds.

    Attributes:
        times: Of training, for each subject that was finished.
        cold_start: Of the first subject of each worker, the median.
        warm_start: Of the others.
        failures: Attempts beyond the first, per worker and hour.
    """

    times: TrainingTimes
    cold_start: float
    warm_start: float
    failures: float


def read_costs(path: Path) -> MeasuredCosts:
    """Costs by the record file of a fleet, one JSON object a line; a subject's last line counts.

    Raises:
        ConfigError: If a line is not a record, or no subject was finished.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            name, record = _record(line, f"line {number} of {path}")
            by_name.pop(name, None)
            by_name[name] = record
    done = [record for record in by_name.values() if record.get("status") == "done"]
    require(bool(done), f"{path} has no subject that is done", "records")
    starts: dict[str, list[float]] = {}
    for record in done:
        starts.setdefault(str(record.get("worker")), []).append(record["start_seconds"])
    firsts = [values[0] for values in starts.values()]
    others = [value for values in starts.values() for value in values[1:]]
    attempts = sum(record.get("attempts", 1) - 1 for record in done)
    hours = sum(record["train_seconds"] + record["start_seconds"] for record in done) / HOUR
    return MeasuredCosts(
        TrainingTimes.of([record["train_seconds"] for record in done]),
        median(firsts),
        median(others or firsts),
        attempts / hours,
    )


def _record(line: str, where: str) -> tuple[str, dict[str, Any]]:
    """The subject and the record of a line."""
    try:
        record = json.loads(line)
        if record.get("status") == "done":
            for name in ("start_seconds", "train_seconds"):
                record[name] = float(record[name])
        return str(record["name"]), record
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where} is not a record of a fleet ({error}); it needs name, status, start_seconds "
            "and train_seconds",
            "records",
        ) from error


def read_arrivals(path: Path) -> list[float]:
    """Arrival times, one a line, as seconds or as ISO 8601 dates; from the first on, ascending.

    Raises:
        ConfigError: If a line is neither, or the file has no time.
    """
    times = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text := line.partition("#")[0].strip():
            try:
                times.append(_time(text))
            except ValueError as error:
                raise ConfigError(
                    f"line {number} of {path} is {text!r}; write seconds, or a date such as "
                    "2026-01-31T12:00:00",
                    "arrivals",
                ) from error
    require(bool(times), f"{path} has no arrival", "arrivals")
    return [time - min(times) for time in sorted(times)]


def _time(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = datetime.fromisoformat(text).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(text)
    return seconds
