"""All trials of a study: those that have a record are read, the others performed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.config import ConfigError
from dora_diffusion.evaluation.measures import measure_of
from dora_diffusion.evaluation.metric_models import open_metric_model
from dora_diffusion.study.config import BASE, Study, Tuning
from dora_diffusion.study.perform import perform
from dora_diffusion.study.subjects import StudySubject, find_subject
from dora_diffusion.study.tables import figure_of, interval, of_row
from dora_diffusion.study.trials import Record, Trial, base_digest, restore_records, trials_of

# Called with trials that are done, of all, the record, and whether it was there before.
OnTrial = Callable[[int, int, Record, bool], None]
_WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class Results:
    """What a study came to.

    Attributes:
        study: The study.
        records: Of its trials.
        tuning: Of the trials that rates were chosen by.
        rates: Learning rates by method, the chosen ones among them.
        subjects: What was learned.
        images: Image files by (row, subject).
    """

    study: Study
    records: Sequence[Record]
    tuning: Sequence[Record] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    subjects: Sequence[StudySubject] = ()
    images: Mapping[tuple[str, str], Path] = field(default_factory=dict)


def run_study(
    study: Study,
    output: Path,
    on_trial: OnTrial | None = None,
    *,
    only_known: bool = False,
) -> Results:
    """Perform every trial that has no record in the folder yet, those of tuning first.

    Several processes may do so in one folder at a time: each trial is one process's. A process that
    is killed loses the trial that it was at. A report's ``records.json`` in the folder counts as
    the records that it was made of.

    Args:
        study: The study.
        output: Its folder.
        on_trial: Called after each trial.
        only_known: Perform nothing; results are of the records that there are.

    Raises:
        ConfigError: If a subject is unknown, or with ``only_known`` a rate cannot be chosen yet.
    """
    models = [open_metric_model(name) for name in study.asked.metric_models]
    subjects = [find_subject(given, study.base, models) for given in study.subjects]
    base = base_digest(study.base, study.common.get("variant"), study.common.get("revision"))
    rates: dict[str, Sequence[float]] = {m.name: m.learning_rates for m in study.methods}
    restore_records(output)
    runner = _Runner(study, output, on_trial, only_known)
    tuning: list[Record] = []
    tuned = [method.name for method in study.methods if method.is_tuned]
    if study.tune and tuned:
        tune = study.tune
        others = [find_subject(given, study.base, models) for given in tune.subjects]
        grid = {name: tune.rates(name) for name in tuned}
        every = [(subject, seed) for seed in tune.seeds for subject in others]
        tuning = runner.records(trials_of(study, base, grid, every))
        rates |= {name: (chosen_rate(tuning, name, tune),) for name in tuned}
    for method in study.methods:
        if method.rate_of:
            rates[method.name] = rates[method.rate_of]
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
        best = interval(mine, figure_of(tune.best))
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
    """Whether a figure is hardly worse than the base's; one that is not measured does not count."""
    ours, theirs = interval(mine, figure_of(name)), interval(base, figure_of(name))
    if ours is None or theirs is None:
        return True
    change = ours.mean - theirs.mean
    worse = {"lower": change, "higher": -change, "base": abs(change)}
    return worse[measure_of(name).better] <= most


@dataclass(frozen=True)
class _Runner:
    """Performs trials, or reads their records."""

    study: Study
    output: Path
    on_trial: OnTrial | None
    only_known: bool

    def records(
        self, trials: Sequence[Trial], imaged: Mapping[str, int] | None = None
    ) -> list[Record]:
        """The records of trials, in their order; images are kept of some subjects' seeds."""
        found: dict[str, Record] = {}
        left, kept = list(trials), imaged or {}
        while left:
            busy = [trial for trial in left if not self._do(trial, found, len(trials), kept)]
            if self.only_known:
                break
            if len(busy) == len(left):
                time.sleep(_WAIT_SECONDS)  # Other processes are at all of them.
            left = busy
        return [found[trial.name] for trial in trials if trial.name in found]

    def _do(
        self, trial: Trial, found: dict[str, Record], total: int, imaged: Mapping[str, int]
    ) -> bool:
        """Read or perform a trial; False if another process is at it."""
        record = trial.known_record(self.output)
        was_known = record is not None
        if record is None and not self.only_known:
            with _claimed(trial, self.output) as is_ours:
                if not is_ours:
                    return False
                record = trial.known_record(self.output)  # It may be done by now.
                if record is None:
                    with_image = imaged.get(trial.subject.name) == trial.seed
                    record = perform(trial, self.study.base, self.output, with_image=with_image)
        if record is not None:
            found[trial.name] = record
            if self.on_trial is not None:
                self.on_trial(len(found), total, record, was_known)
        return True


@contextmanager
def _claimed(trial: Trial, output: Path) -> Iterator[bool]:
    """Hold a trial's lock, which the system frees when the process ends; False if it is taken."""
    from filelock import FileLock, Timeout

    file = output / "work" / "locks" / f"{trial.digest[:20]}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
