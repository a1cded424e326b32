"""The ranking of a run's checkpoints, as it lies on the disk and as it is read.

::

    exports/<run>/comparison/
      comparison.json   what was measured, one row per checkpoint
      <name>.png        the subject, at fixed seeds
      <name>-others.png other things, at fixed seeds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.evaluation.statistics import Interval, t_interval
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.workspace import DamagedFile, Workspace, read_object, write_json

COMPARISON = "comparison.json"
BASE_NAME = "base"


@dataclass(frozen=True)
class RankedCheckpoint:
    """One checkpoint, or the base model, as it was measured.

    Attributes:
        name: ``"checkpoint-N"``, ``"result"`` or ``"base"``.
        similarity: How like the subject its images are; None if that could not be measured.
        drift: How far other things have moved from the base's images of the same seeds.
        images: The subject, and other things.
        similarities: Of each image of the subject, in the same order for every row.
        step: Optimizer steps; 0 is the base. It is the run that tells it, not the file.
    """

    name: str
    similarity: float | None
    drift: float | None
    images: tuple[Path, ...]
    similarities: tuple[float, ...] = ()
    step: int = 0


@dataclass(frozen=True)
class Ranking:
    """What a ranking found.

    Attributes:
        rows: The base first, then checkpoints by step; those that are gone are left out.
        missing: Checkpoints that it does not cover, since they are newer.
        notes: What the figures are, and what could not be measured.
        similar_to: What similarity is to, in few words.
    """

    rows: tuple[RankedCheckpoint, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    similar_to: str = ""

    def gain(self, row: RankedCheckpoint) -> Interval | None:
        """How much more like the subject than the base's its images are, paired by seed.

        Returns:
            The mean difference with its 95% confidence interval; None if that was not measured.
        """
        base = next((row for row in self.rows if not row.step), None)
        if base is None or not row.step or len(row.similarities) != len(base.similarities):
            return None
        if len(row.similarities) < 2:
            return None
        pairs = zip(row.similarities, base.similarities, strict=True)
        return t_interval([adapted - before for adapted, before in pairs])

    @property
    def suggested(self) -> str:
        """The row of the highest similarity less drift among those that have learned the subject.

        Empty if none is more like the subject than the base, or if that was not measured.
        """
        scores = {
            row.name: row.similarity - row.drift
            for row in self.rows
            if row.similarity is not None and row.drift is not None and self._has_learned(row)
        }
        return max(scores, key=lambda name: scores[name], default="")

    def _has_learned(self, row: RankedCheckpoint) -> bool:
        gain = self.gain(row)
        return gain is not None and gain.low is not None and gain.low > 0

    @property
    def verdict(self) -> str:
        """That nothing was learned, with the interval; empty where something was."""
        gains = {row: gain for row in self.rows if (gain := self.gain(row)) is not None}
        if not gains or self.suggested:
            return ""
        best = max(gains, key=lambda row: gains[row].mean)
        gain = gains[best]
        return (
            "None of these checkpoints is more like the subject than the base model: the best, "
            f"step {best.step}, differs by {gain.mean:+.2f} (95% confidence interval "
            f"{gain.low:+.2f} to {gain.high:+.2f}, {gain.n} images). Train longer, raise "
            "learning_rate or rank, or check the photos and captions."
        )


def write_ranking(
    folder: Path, rows: Sequence[RankedCheckpoint], notes: Sequence[str], similar_to: str
) -> None:
    """Write comparison.json."""
    values = [
        {
            "name": row.name,
            "similarity": row.similarity,
            "similarities": row.similarities,
            "drift": row.drift,
            "pictures": [path.name for path in row.images],
        }
        for row in rows
    ]
    write_json(folder / COMPARISON, {"rows": values, "notes": notes, "similar_to": similar_to})


def read_ranking(workspace: Workspace, job: Job) -> Ranking | None:
    """What was measured of a run's checkpoints; None before that.

    Raises:
        DamagedFile: If comparison.json cannot be read.
    """
    path = workspace.ranking(job.id) / COMPARISON
    values = read_object(path)
    if values is None:
        return None
    known = {BASE_NAME, *job.candidates, *job.checkpoints}
    try:
        rows = tuple(_row(job, row, path.parent) for row in values["rows"] if row["name"] in known)
        notes = tuple(map(str, values["notes"]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedFile(path, "its rows are none") from error
    measured = {row.name for row in rows}
    missing = tuple(name for name in job.candidates if name not in measured)
    return Ranking(rows, missing, notes, str(values.get("similar_to", "")))


def _row(job: Job, values: Mapping[str, Any], folder: Path) -> RankedCheckpoint:
    similarity, drift = (
        None if values[name] is None else float(values[name]) for name in ("similarity", "drift")
    )
    return RankedCheckpoint(
        values["name"],
        similarity,
        drift,
        tuple(folder / file for file in values["pictures"]),
        tuple(map(float, values.get("similarities") or ())),
        0 if values["name"] == BASE_NAME else job.step_of(values["name"]),
    )
