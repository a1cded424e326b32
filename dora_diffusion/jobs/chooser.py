"""The checkpoint chooser: checkpoints side by side, and which of them is the run's adapter.

::

    exports/<run>/comparison/
      comparison.json   what was measured, one row per checkpoint
      <name>.png        the subject, at fixed seeds
      <name>-others.png other things, at fixed seeds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.evaluation.statistics import Interval, t_interval
from dora_diffusion.jobs.queue import CHOSEN, create_job
from dora_diffusion.jobs.snapshot import RESULT_NAME, Job
from dora_diffusion.jobs.workspace import AppError, Workspace, read_json, write_json

COMPARISON = "comparison.json"
BASE_NAME = "base"
# More rows than a page can show, and a comparison that takes longer than the run.
MOST = 8


@dataclass(frozen=True)
class Row:
    """One checkpoint, or the base model, as it was measured.

    Attributes:
        name: ``"checkpoint-N"``, ``"result"`` or ``"base"``.
        step: Optimizer steps; 0 is the base.
        similarity: How like the subject its pictures are; None if that could not be measured.
        drift: How far other things have moved from the base's pictures of the same seeds.
        pictures: The subject, and other things.
        similarities: Of each picture of the subject, in the same order for every row.
    """

    name: str
    step: int
    similarity: float | None
    drift: float | None
    pictures: tuple[Path, ...]
    similarities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        rows: The base first, then checkpoints by step; those that are gone are left out.
        missing: Checkpoints that it does not cover, since they are newer.
        notes: What the figures are, and what could not be measured.
        similar_to: What similarity is to, in few words.
    """

    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    similar_to: str = ""

    def gain(self, row: Row) -> Interval | None:
        """How much more like the subject than the base's its pictures are, paired by seed.

        Returns:
            The mean difference with its 95% confidence interval; None if that was not measured.
        """
        base = next((one for one in self.rows if not one.step), None)
        if base is None or not row.step or len(row.similarities) != len(base.similarities):
            return None
        if len(row.similarities) < 2:
            return None
        pairs = zip(row.similarities, base.similarities, strict=True)
        return t_interval([mine - theirs for mine, theirs in pairs])

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

    def _has_learned(self, row: Row) -> bool:
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


def candidates(job: Job) -> tuple[str, ...]:
    """What can be chosen: spread over the run, the last ones always."""
    names = list(job.checkpoints)
    # At the last step there often is a checkpoint too, with the same weights.
    if job.state == "done":
        last = f"checkpoint-{job.step}"
        names = [name for name in names if name != last] + [RESULT_NAME]
    if len(names) > MOST:
        places = (round(i * (len(names) - 1) / (MOST - 1)) for i in range(MOST))
        names = [names[place] for place in places]
    return tuple(names)


def comparison_folder(workspace: Workspace, run_id: str) -> Path:
    """Where a run's comparison lies; it is deleted with the run's exports."""
    return workspace.exports / run_id / "comparison"


def read_comparison(workspace: Workspace, job: Job) -> Comparison | None:
    """What was measured of a run's checkpoints; None before that."""
    folder = comparison_folder(workspace, job.id)
    found = read_json(folder / COMPARISON)
    if not found:
        return None
    known = {BASE_NAME, *candidates(job), *job.checkpoints}
    rows = tuple(
        Row(
            one["name"],
            0 if one["name"] == BASE_NAME else job.step_of(one["name"]),
            one["similarity"],
            one["drift"],
            tuple(folder / name for name in one["pictures"]),
            tuple(one.get("similarities") or ()),
        )
        for one in found["rows"]
        if one["name"] in known
    )
    measured = {row.name for row in rows}
    missing = tuple(name for name in candidates(job) if name not in measured)
    return Comparison(rows, missing, tuple(found["notes"]), str(found.get("similar_to", "")))


def start_comparison(workspace: Workspace, job: Job) -> str:
    """Queue a job that compares a run's checkpoints. Returns its id.

    Raises:
        AppError: If there is nothing to compare, or it is being compared.
    """
    names = candidates(job)
    if not names:
        raise AppError("this run has no checkpoint yet; wait until it has saved one")
    facts = {"run": job.id, "base": job.base, "checkpoints": list(names)}
    return create_job(workspace, "compare", f"Compare {job.title}", facts)


def comparing(jobs: Sequence[Job], run_id: str) -> Job | None:
    """The newest comparison job of a run."""
    found = (job for job in jobs if job.kind == "compare" and job.facts.get("run") == run_id)
    return next(found, None)


def choose(job: Job, name: object) -> int:
    """Make a checkpoint the run's adapter: what Generate and Library take. Returns its step.

    Raises:
        AppError: If the run has no such checkpoint.
    """
    if not isinstance(name, str) or name not in {*candidates(job), *job.checkpoints}:
        raise AppError("this checkpoint no longer exists; choose another one")
    write_json(job.folder / CHOSEN, {"checkpoint": name})
    return job.step_of(name)
