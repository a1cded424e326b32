"""The adapters of a training run: its checkpoints, its result, how they rank, and which is taken.

::

    exports/<run>/comparison/
      comparison.json   the ranking: what was measured, one row per checkpoint
      <name>.png        the subject, at fixed seeds
      <name>-others.png other things, at fixed seeds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.formats.files.names import PIPELINE_NAME, pipeline_in
from dora_diffusion.formats.files.runs import RESULT_NAME, result_adapter
from dora_diffusion.studio.jobs.records import CHOSEN
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.workspace import (
    DamagedFile,
    UserError,
    Workspace,
    read_object,
    write_json,
)

if TYPE_CHECKING:
    from dora_diffusion.evaluation.statistics import Interval


def choose(job: Job, name: object) -> int:
    """Make a checkpoint the run's adapter: what Generate and Library take. Returns its step.

    Raises:
        UserError: If the run has no such checkpoint.
    """
    if not isinstance(name, str) or name not in {*job.candidates, *job.checkpoints}:
        raise UserError("this checkpoint no longer exists; choose another one")
    write_json(job.folder / CHOSEN, {"checkpoint": name})
    return job.step_of(name)


def adapter_of(job: Job, name: str = "") -> Path | None:
    """The adapter that is selected for a run, or another one of its by name."""
    name = name or job.stands
    if name == RESULT_NAME:
        return result_adapter(job.folder) if job.has_result else None
    return result_adapter(job.folder / name) if name in job.checkpoints else None


def card_of(folder: Path, adapter: Path) -> str:
    """The model card of a run's adapter: the trainer's, or one of another checkpoint.

    Args:
        folder: The run's.
        adapter: An adapter file of it.

    Raises:
        ValueError, OSError: If the run's config.yaml or the adapter cannot be read.
    """
    written = folder / "README.md"
    if adapter.parent == folder and written.is_file():
        return written.read_text(encoding="utf-8")
    from dora_diffusion.config import TrainConfig, read_config_file
    from dora_diffusion.export import inspect_adapter
    from dora_diffusion.training.inputs.subject import subjects_of
    from dora_diffusion.training.results.card import model_card

    config = TrainConfig.from_dict(read_config_file(folder / "config.yaml"))
    report = inspect_adapter(adapter)
    steps = int(report.metadata.extra["training_steps"])
    sample = folder / "samples" / f"step-{steps:06d}.png"
    samples = {f"At step {steps}": f"samples/{sample.name}"} if sample.is_file() else {}
    layers = f"{sum(report.layers.values())} layers"
    return model_card(config, subjects_of(config), report.metadata, adapter, layers, samples)


def chosen_adapter(job: Job, checkpoint: str = "") -> Path:
    """The adapter of a run or of one of its checkpoints.

    Raises:
        UserError: If the run has none.
    """
    path = adapter_of(job, checkpoint)
    if path is None and pipeline_in(job.folder):
        raise UserError(
            f"this run fine-tuned the model itself, which is in {job.folder / PIPELINE_NAME}; it "
            "has no adapter. Train offers it as a base model, and 'dora-diffusion generate --base' "
            "takes it"
        )
    if path is None:
        raise UserError("this run has no adapter yet; wait until it is done, or take a checkpoint")
    return path


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
        similarities: Of each image of the subjects, in the same order for every row.
        step: Optimizer steps; 0 is the base. It is the run that tells it, not the file.
        loss: Denoising loss on held-out photos; None without any.
    """

    name: str
    similarity: float | None
    drift: float | None
    images: tuple[Path, ...]
    similarities: tuple[float, ...] = ()
    step: int = 0
    loss: float | None = None

    def by_subject(self, count: int) -> list[float | None]:
        """Similarity of each of ``count`` subjects, which have as many images."""
        each = len(self.similarities) // count if count else 0
        parts = [self.similarities[at * each : (at + 1) * each] for at in range(count)]
        return [sum(part) / each if part else None for part in parts]


@dataclass(frozen=True)
class Ranking:
    """What a ranking found.

    Attributes:
        rows: The base first, then checkpoints by step; those that are gone are left out.
        missing: Checkpoints that it does not cover, since they are newer.
        notes: What the figures are, and what could not be measured.
        similar_to: What similarity is to, in few words.
        triggers: Trigger words of each subject; the figures are means over them.
    """

    rows: tuple[RankedCheckpoint, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    similar_to: str = ""
    triggers: tuple[str, ...] = ()

    def gain(self, row: RankedCheckpoint) -> Interval | None:
        """How much more like the subject than the base's its images are, paired by seed.

        Returns:
            The mean difference with its 95% confidence interval; None if that was not measured.
        """
        from dora_diffusion.evaluation.statistics import t_interval

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


def write_ranking(folder: Path, ranking: Ranking) -> None:
    """Write comparison.json."""
    values = [
        {
            "name": row.name,
            "similarity": row.similarity,
            "similarities": row.similarities,
            "drift": row.drift,
            "loss": row.loss,
            "images": [path.name for path in row.images],
        }
        for row in ranking.rows
    ]
    told = {name: getattr(ranking, name) for name in ("notes", "similar_to", "triggers")}
    write_json(folder / COMPARISON, {"rows": values, **told})


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
    triggers = tuple(map(str, values["triggers"]))
    return Ranking(rows, missing, notes, str(values["similar_to"]), triggers)


def _row(job: Job, values: Mapping[str, Any], folder: Path) -> RankedCheckpoint:
    similarity, drift, loss = (
        None if values[name] is None else float(values[name])
        for name in ("similarity", "drift", "loss")
    )
    return RankedCheckpoint(
        values["name"],
        similarity,
        drift,
        tuple(folder / file for file in values["images"]),
        tuple(map(float, values["similarities"])),
        0 if values["name"] == BASE_NAME else job.step_of(values["name"]),
        loss,
    )
