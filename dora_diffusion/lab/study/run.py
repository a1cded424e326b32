"""All trials of a study: those that have a record are read, the others performed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.cluster.fleet.cluster import Share
from dora_diffusion.cluster.fleet.queue import Task, TaskReport, Worker, WorkQueue, run_tasks
from dora_diffusion.cluster.fleet.run import absolute, workers_for
from dora_diffusion.config import ConfigError
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import require
from dora_diffusion.evaluation.measures import measure_of
from dora_diffusion.lab.study.config import BASE, Study, Tuning
from dora_diffusion.lab.study.report import Results, interval, of_row
from dora_diffusion.lab.study.subjects import find_subject
from dora_diffusion.lab.study.trials import (
    Record,
    Trial,
    base_digest,
    check_methods,
    perform,
    restore_records,
    trials_of,
)
from dora_diffusion.models.metric_models import open_metric_model

# Called with trials that are done, of all, the record, and whether it was there before.
OnTrial = Callable[[int, int, Record, bool], None]


@check_arguments()
def run_study(
    study: Study,
    output: str | Path,
    on_trial: OnTrial | None = None,
    *,
    only_known: bool = False,
    address: str | None = None,
    share: Share | None = None,
) -> Results:
    """Perform every trial that has no record in the folder yet, those of tuning first.

    A process that is killed loses its present trial. A report's ``records.json`` in the folder
    counts as the records that it was made of.

    Args:
        study: The study.
        output: Its folder.
        on_trial: Called after each trial.
        only_known: Perform nothing; results are of the records that there are.
        address: A Ray cluster whose workers perform the trials (`cluster.fleet.run.run_fleet`);
            all of them must see the folder. None: this process, one after another.
        share: What each worker takes of a node.

    Raises:
        ConfigError: If a subject is unknown or methods cannot be trained, before any is; or with
            ``only_known`` a rate cannot be chosen yet.
    """
    models = [open_metric_model(name) for name in study.asked.metric_models]
    subjects = [find_subject(given, study.base, models) for given in study.subjects]
    names = [subject.name for subject in subjects]
    require(len({*names}) == len(names), f"two subjects have one name: {', '.join(names)}")
    base = base_digest(model := BaseModel.of_settings({**study.common, "base": study.base}))
    rates: dict[str, Sequence[float]] = {m.name: m.learning_rates for m in study.methods}
    output = Path(output).absolute()  # Workers have folders of their own.
    restore_records(output)
    if not only_known:
        check_methods(study, subjects, model, output)
    runner = _Runner(study, output, on_trial, only_known, address, share)
    tuning: list[Record] = []
    tuned = [method.name for method in study.methods if method.is_tuned]
    if study.tune and tuned:
        tune = study.tune
        others = [find_subject(given, study.base, models) for given in tune.subjects]
        grid = {name: tune.rates(name) for name in tuned}
        every = [(subject, seed) for seed in tune.seeds for subject in others]
        tuning = runner.records(trials_of(study, base, grid, every))
        rates |= {name: (chosen_rate(tuning, name, tune),) for name in tuned}
    rates |= {m.name: rates[m.rate_of] for m in study.methods if m.rate_of}
    pairs = [(subjects[place], seed) for place, seed in study.pairs()]
    # Of each subject's first seed.
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
    """The rate with the best figure among those that keep others as the base has them.

    Raises:
        ConfigError: If there is no record of a method, or none has the figure.
    """
    base = of_row(records, BASE)
    scores: dict[float, float] = {}
    kept = set()
    for rate in sorted(tune.rates(method)):
        mine = [r for r in records if (r["method"], r["learning_rate"]) == (method, rate)]
        best = interval(mine, tune.best)
        if best is None:
            continue
        better = measure_of(tune.best).better
        scores[rate] = -best.mean if better == "lower" else best.mean
        if all(_keeps(mine, base, name, most) for name, most in tune.keep.items()):
            kept.add(rate)
    if not scores:
        raise ConfigError(f"no trial of {method} has the figure {tune.best} yet: run its tuning")
    # Of equally good ones the smallest.
    return max(sorted(kept), key=scores.__getitem__) if kept else min(scores)


def _keeps(mine: Sequence[Record], base: Sequence[Record], name: str, most: float) -> bool:
    """Return whether a figure is hardly worse than the base's; an unmeasured one does not count."""
    ours, theirs = interval(mine, name), interval(base, name)
    if ours is None or theirs is None:
        return True
    change = ours.mean - theirs.mean
    worse = {"lower": change, "higher": -change, "base": abs(change)}
    return worse[measure_of(name).better] <= most


def _perform(job: tuple[Trial, str, Path, bool], worker: Worker) -> Record:
    trial, base, output, with_image = job
    return perform(trial, base, output, with_image=with_image, load=worker.load)


@dataclass(frozen=True)
class _Runner:
    """Runner of trials, which may read their records instead."""

    study: Study
    output: Path
    on_trial: OnTrial | None
    only_known: bool
    address: str | None
    share: Share | None

    def records(
        self, trials: Sequence[Trial], imaged: Mapping[str, int] | None = None
    ) -> list[Record]:
        """The records of trials, in their order; images are kept of some subjects' seeds."""
        found: dict[str, Record] = {}
        # Trials of one digest are one training, whatever their rows are called.
        left: dict[str, list[Trial]] = {}

        def end(trial: Trial, record: Record, was_known: bool) -> None:
            found[trial.name] = record
            if self.on_trial is not None:
                self.on_trial(len(found), len(trials), record, was_known)

        def on_end(ended: TaskReport) -> None:
            if ended.error is not None:
                raise ended.error
            for trial in left[ended.task.name]:
                own = {"row": trial.row, "method": trial.method}
                end(trial, {**ended.value, **own}, False)

        for trial in trials:
            record = trial.known_record(self.output)
            if record is not None:
                end(trial, record, True)
            elif not self.only_known:
                left.setdefault(trial.digest, []).append(trial)
        queue, base, wanted = WorkQueue(), absolute(self.study.base), imaged or {}
        for name, (trial, *_) in left.items():
            with_image = wanted.get(trial.subject.name) == trial.seed
            queue.add([Task(name, (trial, base, self.output, with_image))])
        if left:
            run_tasks(queue, workers_for(_perform, self.address, self.share), on_end)
        return [found[trial.name] for trial in trials if trial.name in found]
