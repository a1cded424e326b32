"""Runs a study: reads the records of finished trials, and performs the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from dora_diffusion.cluster.fleet.connection import Share
from dora_diffusion.cluster.fleet.queue import Task, TaskReport, Worker, WorkQueue, run_tasks
from dora_diffusion.cluster.fleet.run import absolute, workers_for
from dora_diffusion.config import ConfigError
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import require
from dora_diffusion.evaluation.measures import measure_of
from dora_diffusion.models.metric_models import open_metric_model
from lab.study.config import BASE, Study, Tuning
from lab.study.report import Results, interval, of_row
from lab.study.subjects import find_subject
from lab.study.trials import (
    Record,
    Trial,
    base_digest,
    check_methods,
    perform,
    restore_records,
    trials_of,
)

# Called with (finished trials, total trials, record, whether the record existed before).
OnTrial = Callable[[int, int, Record, bool], None]


def run_study(
    study: Study,
    output: str | PathLike[str],
    on_trial: OnTrial | None = None,
    *,
    only_known: bool = False,
    address: str | None = None,
    share: Share | None = None,
) -> Results:
    """Perform all trials without a record in the folder, starting with tuning.

    A killed process loses only its current trial. Records are also read from a report's
    ``records.json`` in the folder.

    Args:
        study: The study.
        output: Folder of the study.
        on_trial: Called after each trial.
        only_known: Perform no trials; report existing records.
        address: Ray cluster whose workers perform the trials (`cluster.fleet.run.run_fleet`); all
            of them must have access to the folder. None: this process, one trial after another.
        share: Resources of a node for each worker.

    Raises:
        ConfigError: If a subject is unknown or a method cannot be trained (checked before the
            first trial); or, with ``only_known``, if a rate cannot be chosen yet.
    """
    models = [open_metric_model(name) for name in study.asked.metric_models]
    subjects = [find_subject(spec, study.base, models) for spec in study.subjects]
    names = [subject.name for subject in subjects]
    require(len({*names}) == len(names), f"two subjects have one name: {', '.join(names)}")
    base = base_digest(model := BaseModel.of_settings({**study.common, "base": study.base}))
    rates: dict[str, Sequence[float]] = {m.name: m.learning_rates for m in study.methods}
    output = Path(output).absolute()  # Workers have other working directories.
    restore_records(output)
    if not only_known:
        check_methods(study, subjects, model, output)
    runner = _Runner(study, output, on_trial, only_known, address, share)
    tuning: list[Record] = []
    tuned = [method.name for method in study.methods if method.is_tuned]
    if study.tune and tuned:
        tune = study.tune
        tuning_subjects = [find_subject(spec, study.base, models) for spec in tune.subjects]
        grid = {name: tune.rates(name) for name in tuned}
        tuning_pairs = [(subject, seed) for seed in tune.seeds for subject in tuning_subjects]
        tuning = runner.records(trials_of(study, base, grid, tuning_pairs))
        rates |= {name: (chosen_rate(tuning, name, tune),) for name in tuned}
    rates |= {m.name: rates[m.rate_of] for m in study.methods if m.rate_of}
    pairs = [(subjects[index], seed) for index, seed in study.pairs()]
    # Images are kept of the first seed of each subject.
    imaged = {subject.name: seed for subject, seed in reversed(pairs)}
    trials = trials_of(study, base, rates, pairs)
    records = runner.records(trials, imaged)
    images = {
        (trial.row, trial.subject.name): trial.image(output)
        for trial in trials
        if trial.seed == imaged[trial.subject.name] and trial.image(output).is_file()
    }
    return Results(study, records, tuning, rates, subjects, images)


def chosen_rate(records: Sequence[Record], method: str, tune: Tuning) -> float:
    """Choose the rate with the best figure that keeps other figures near the base's.

    Raises:
        ConfigError: If the method has no records with the figure.
    """
    base = of_row(records, BASE)
    scores: dict[float, float] = {}
    within_limits = set()
    for rate in sorted(tune.rates(method)):
        rate_records = [r for r in records if (r["method"], r["learning_rate"]) == (method, rate)]
        best = interval(rate_records, tune.best)
        if best is None:
            continue
        better = measure_of(tune.best).better
        scores[rate] = -best.mean if better == "lower" else best.mean
        if all(_keeps(rate_records, base, name, most) for name, most in tune.keep.items()):
            within_limits.add(rate)
    if not scores:
        raise ConfigError(f"no trial of {method} has the figure {tune.best} yet: run its tuning")
    # The smallest of equally good rates.
    return max(sorted(within_limits), key=scores.__getitem__) if within_limits else min(scores)


def _keeps(records: Sequence[Record], base: Sequence[Record], name: str, most: float) -> bool:
    """Return whether a figure is within a limit of the base's; True if not measured."""
    figure, base_figure = interval(records, name), interval(base, name)
    if figure is None or base_figure is None:
        return True
    change = figure.mean - base_figure.mean
    worsening = {"lower": change, "higher": -change, "base": abs(change)}
    return worsening[measure_of(name).better] <= most


def _perform(job: tuple[Trial, str, Path, bool], worker: Worker) -> Record:
    trial, base, output, with_image = job
    return perform(trial, base, output, with_image=with_image, load=worker.load)


@dataclass(frozen=True)
class _Runner:
    """Runner that reads records of trials, and performs trials without one."""

    study: Study
    output: Path
    on_trial: OnTrial | None
    only_known: bool
    address: str | None
    share: Share | None

    def records(
        self, trials: Sequence[Trial], imaged: Mapping[str, int] | None = None
    ) -> list[Record]:
        """Get the records of trials, in order; keep the images of the given seeds by subject."""
        results: dict[str, Record] = {}
        # Trials with the same digest share one training, even in different rows.
        pending: dict[str, list[Trial]] = {}

        def end(trial: Trial, record: Record, was_known: bool) -> None:
            results[trial.name] = record
            if self.on_trial is not None:
                self.on_trial(len(results), len(trials), record, was_known)

        def on_end(ended: TaskReport) -> None:
            if ended.error is not None:
                raise ended.error
            for trial in pending[ended.task.name]:
                labels = {"row": trial.row, "method": trial.method}
                end(trial, {**ended.value, **labels}, False)

        for trial in trials:
            record = trial.known_record(self.output)
            if record is not None:
                end(trial, record, True)
            elif not self.only_known:
                pending.setdefault(trial.digest, []).append(trial)
        queue, base, image_seeds = WorkQueue(), absolute(self.study.base), imaged or {}
        for name, (trial, *_) in pending.items():
            with_image = image_seeds.get(trial.subject.name) == trial.seed
            queue.add([Task(name, (trial, base, self.output, with_image))])
        if pending:
            run_tasks(queue, workers_for(_perform, self.address, self.share), on_end)
        return [results[trial.name] for trial in trials if trial.name in results]
