"""Forecasts of a fleet: costs and arrivals of subjects, formulas, tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.config.wording import aligned, counted, duration
from dora_diffusion.evaluation.statistics import Interval, t_interval
from lab.analysis.plots import MARKERS, ordered_color, panel_grid, tidy
from lab.simulation.queue import HOUR, QueuePlan, Values, simulate_queue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A plan is refused if failures prolong a training by more than this factor.
_HOPELESS = 100
PERCENTILES = (50, 90, 99)
BATCHES = 20
# Fraction of arrivals at a rate that is excluded, since the queue starts empty.
WARM_UP = 0.1
LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_PLOTTED_SUBJECTS = 20_000
# Columns of the table after the times: title -> figure and its format.
_COLUMNS = {
    "utilisation": ("utilisation", "{:.0%}"),
    "subjects per hour": ("subjects_per_hour", "{:.1f}"),
    "capacity per hour": ("capacity_per_hour", "{:.1f}"),
    "GPU-hours": ("gpu_hours", "{:.1f}"),
}


@dataclass(frozen=True)
class TrainingTimes:
    """Training times of a subject alone on a worker, without its start.

    Attributes:
        mean: Mean in seconds.
        variation: Standard deviation over the mean of a gamma distribution: 0 constant, 1
            exponential.
        measured: Measured times to draw from instead.
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
        """Make the distribution of measured times."""
        mean = fmean(measured)
        spread = math.sqrt(fmean((value - mean) ** 2 for value in measured))
        return cls(mean, spread / mean, tuple(measured))

    def draw(self, count: int, generator: np.random.Generator) -> Values:
        """Draw ``count`` independent times."""
        if self.measured:
            return generator.choice(np.asarray(self.measured), count)
        if not self.variation:
            return np.full(count, float(self.mean))
        return generator.gamma(self.variation**-2, self.mean * self.variation**2, count)


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs in the record file of a fleet, in seconds.

    Attributes:
        times: Training times of all finished subjects.
        cold_start: Median start time of the first subject of each worker.
        warm_start: Median start time of further subjects.
        failures: Repeated attempts per worker and hour.
    """

    times: TrainingTimes
    cold_start: float
    warm_start: float
    failures: float


def read_costs(path: Path) -> MeasuredCosts:
    """Read costs from the record file of a fleet; the last line of each subject is used.

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
    first_starts = [values[0] for values in starts.values()]
    later_starts = [value for values in starts.values() for value in values[1:]]
    attempts = sum(record.get("attempts", 1) - 1 for record in done)
    hours = sum(record["train_seconds"] + record["start_seconds"] for record in done) / HOUR
    return MeasuredCosts(
        TrainingTimes.of([record["train_seconds"] for record in done]),
        median(first_starts),
        median(later_starts or first_starts),
        attempts / hours,
    )


def _record(line: str, where: str) -> tuple[str, dict[str, Any]]:
    """Parse a line to the subject's name and its record."""
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
    """Read arrival times, one per line, in seconds or as ISO 8601 dates.

    Returns:
        Seconds after the first arrival, ascending.

    Raises:
        ConfigError: If a line is neither, or the file has no times.
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


@dataclass(frozen=True)
class Demand:
    """Arriving subjects.

    Attributes:
        times: Training times.
        subjects: Number of subjects.
        rate: Rate of a Poisson process, in subjects per hour; None: ``arrivals``.
        arrivals: Arrival times in seconds; empty: all at once.
        seed: Random seed of all draws.
    """

    times: TrainingTimes
    subjects: int
    rate: float | None = None
    arrivals: tuple[float, ...] = ()
    seed: int = 0

    def draw(self) -> tuple[Values, Values]:
        """Draw arrival and training times, the same for each number of workers."""
        spawned = np.random.SeedSequence(self.seed).spawn(2)
        arriving, training = (np.random.default_rng(sequence) for sequence in spawned)
        work = self.times.draw(self.subjects, training)
        if self.rate is not None:
            return arriving.exponential(HOUR / self.rate, self.subjects).cumsum(), work
        return np.asarray(self.arrivals or [0.0] * self.subjects), work


def check_failures(plan: QueuePlan, seconds: float) -> None:
    """Refuse a plan whose workers fail so often that trainings would hardly end.

    Args:
        plan: The plan.
        seconds: Mean training time of a single subject.

    Raises:
        ConfigError: If failures prolong trainings too much.
    """
    whole = plan.cold_start + seconds
    # The limit avoids an overflow of the exponential.
    stretch = min(plan.checkpoint_seconds or seconds, seconds)
    tries = plan.failures / HOUR * (plan.cold_start + stretch)
    hopeless = tries > 100 or _HOPELESS * whole < expected_completion(
        seconds,
        plan.failures / HOUR,
        start=plan.cold_start,
        restart=plan.cold_start,
        interval=plan.checkpoint_seconds,
        recovery=plan.recovery,
    )
    require(
        not hopeless,
        f"failures is {plan.failures} per worker and hour, but saving progress takes "
        f"{plan.cold_start + stretch:.0f} s from a start, so subjects would hardly end; lower "
        "failures or "
        "checkpoint_seconds",
        "failures",
    )


def erlang_c(load: float, workers: int) -> float:
    """Probability that a subject has to wait in M/M/c (Erlang, 1917).

    Args:
        load: Arrivals per second times seconds of service, below ``workers``.
        workers: Number of workers.
    """
    # Erlang B by recursion, which does not overflow, unlike factorials.
    blocked = 1.0
    for count in range(1, workers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


def expected_wait(rate: float, seconds: float, variation: float, workers: int) -> float:
    """Mean wait for Poisson arrivals, first come, first served.

    Exact for one worker (M/G/1: Pollaczek and Khinchine), and for any number of workers with
    exponential service times (M/M/c: Erlang C); else the approximation of Allen and Cunneen, within
    a few percent.

    Args:
        rate: Arrivals per second.
        seconds: Mean service time.
        variation: Standard deviation of the service time over its mean.
        workers: Number of workers.

    Returns:
        Seconds; infinity if the queue grows without limit.
    """
    load = rate * seconds
    if load >= workers:
        return math.inf
    exponential = erlang_c(load, workers) * seconds / (workers - load)
    return exponential * (1 + variation**2) / 2


def expected_completion(
    seconds: float,
    failures: float,
    *,
    start: float = 0.0,
    restart: float = 0.0,
    interval: float = 0.0,
    recovery: float = 0.0,
) -> float:
    """Mean time to complete a training that resumes from its last checkpoint after failures.

    Each stretch between checkpoints is repeated until it succeeds (Daly, 2006, without the time of
    saving, and with failures during restarts).

    Args:
        seconds: Training time without failures.
        failures: Rate of failures per second (a Poisson process).
        start: Seconds before the first step.
        restart: Seconds before the first step after a failure.
        interval: Training time between checkpoints; 0: none are saved.
        recovery: Seconds from a failure to the restart.
    """
    if not failures:
        return start + seconds
    stretches = max(1, math.ceil(seconds / interval - 1e-9)) if interval else 1
    last = seconds - (stretches - 1) * interval

    def passed(before: float, stretch: float) -> float:
        fails_first = -math.expm1(-failures * (before + stretch))
        return fails_first * math.exp(failures * (restart + stretch)) * (1 / failures + recovery)

    if stretches == 1:
        return passed(start, last)
    return passed(start, interval) + (stretches - 2) * passed(0.0, interval) + passed(0.0, last)


def forecast(plan: QueuePlan, demand: Demand) -> dict[str, Any]:
    """Simulate a queue; returns its figures for JSON, and the result of a formula if one applies.

    The mean wait excludes the warm-up, and its interval is by batch means. The formula applies to
    warm workers without packs, failures, preemption or release of idle workers. It ignores the
    first, cold start of each worker.
    """
    outcome, times = simulate_queue(plan, *demand.draw(), seed=demand.seed), demand.times
    select = settled if demand.rate is not None else np.asarray
    waits, turnarounds = select(outcome.waits), select(outcome.turnarounds)
    count = len(outcome.waits)
    phases = ("training", "lost", "starting", "idle", "recovering")
    result: dict[str, Any] = {
        "workers": plan.workers,
        "subjects": count,
        "seconds": outcome.seconds,
        "subjects_per_hour": outcome.subjects_per_hour,
        "wait": {f"p{p}": float(np.percentile(waits, p)) for p in PERCENTILES},
        "turnaround": {f"p{p}": float(np.percentile(turnarounds, p)) for p in PERCENTILES},
        "utilisation": outcome.utilisation,
        "worker_seconds": {name: getattr(outcome, name) for name in phases},
        "mean_pack": (count + outcome.interruptions) / outcome.packs,
        "interruptions": outcome.interruptions,
    }
    if demand.rate is None:
        return result
    mean, formula = mean_of(waits), None
    result["wait"] |= {"mean": mean.mean, "low": mean.low, "high": mean.high}
    is_simple = plan.pack == 1 and plan.keep_warm is None
    if is_simple and not plan.failures and not plan.preemptions:
        seconds = plan.warm_start + times.mean
        spread = times.variation * times.mean / seconds
        formula = expected_wait(demand.rate / HOUR, seconds, spread, plan.workers)
    is_exponential = times.variation == 1 and not times.measured and not plan.warm_start
    result["wait_by_formula"] = formula if formula is None or math.isfinite(formula) else None
    result["formula_is_exact"] = plan.workers == 1 or is_exponential
    return result


def with_costs(
    plan: QueuePlan, demand: Demand, gpus: float = 1.0, price: float | None = None
) -> dict[str, Any]:
    """Make a forecast with the capacity and the cost of the workers.

    Args:
        plan: The plan.
        demand: The arriving subjects.
        gpus: GPUs per worker.
        price: Price of a GPU-hour.
    """
    result = forecast(plan, demand)
    paid = sum(s for name, s in result["worker_seconds"].items() if name != "lost")
    hours = paid / HOUR * gpus
    return result | {
        "capacity_per_hour": capacity_of(plan, demand),
        "gpu_hours": hours,
        "cost_per_subject": None if price is None else hours * price / result["subjects"],
    }


def settled(values: Values) -> Values:
    """Return the values without the warm-up."""
    return values[int(WARM_UP * len(values)) :]


def mean_of(values: Values) -> Interval:
    """Mean with its interval by batch means, since waits of consecutive subjects are correlated."""
    batches = np.array_split(values, min(BATCHES, len(values)))
    return replace(t_interval([float(batch.mean()) for batch in batches]), n=len(values))


def capacity_of(plan: QueuePlan, demand: Demand) -> float:
    """Subjects per hour under full load, measured in the middle of a long backlog."""
    count = max(2000, 40 * plan.workers * plan.pack)
    work = demand.times.draw(count, np.random.default_rng(demand.seed))
    outcome = simulate_queue(plan, [0.0] * count, work, demand.seed)
    ends = np.sort(outcome.turnarounds)
    first, last = count // 5, count - count // 5
    span = ends[last] - ends[first]
    return float((last - first) / span * HOUR) if span else outcome.subjects_per_hour


def table(results: Sequence[dict[str, Any]], *, has_price: bool) -> str:
    """Format a table with a row for each number of workers."""
    times = [(kind, f"p{p}") for kind in ("wait", "turnaround") for p in PERCENTILES]
    rows = [["workers", *map(" ".join, times), *_COLUMNS]]
    if has_price:
        rows[0].append("cost per subject")
    for result in results:
        row = [str(result["workers"]), *(duration(result[kind][p]) for kind, p in times)]
        row += [form.format(result[key]) for key, form in _COLUMNS.values()]
        rows.append(row + ([f"{result['cost_per_subject']:.4g}"] if has_price else []))
    return aligned(rows)


def remarks(results: Sequence[dict[str, Any]], demand: Demand) -> list[str]:
    """Return remarks on the table: confidence intervals, formulas, and growing queues."""
    lines = []
    for result in results:
        title, wait = counted(result["workers"], "worker"), result["wait"]
        if demand.rate is None:
            lines.append(f"{title}: all are done after {duration(result['seconds'])}")
            continue
        load = demand.rate / result["capacity_per_hour"]
        low, high = max(0.0, wait["low"] or 0.0), wait["high"] or wait["mean"]
        line = f"{title}: load {load:.0%}, mean wait {wait['mean']:.1f} s "
        line += f"(95% confidence interval {low:.1f} to {high:.1f} s)"
        if result["wait_by_formula"] is not None:
            kind = "formula" if result["formula_is_exact"] else "formula's approximation"
            line += f", by the {kind} {result['wait_by_formula']:.1f} s"
        if load >= 1:
            needed = math.ceil(load * result["workers"])
            line += f"; the queue grows without end, more than {needed} workers are needed"
        lines.append(line)
    return lines


def plot(plans: Sequence[QueuePlan], demand: Demand) -> Figure:
    """Plot mean and p90 of the wait over load for Poisson arrivals, and the formula if it applies.

    Load is the arrival rate over the capacity.
    """
    figure, (panel,) = panel_grid(1, (7.2, 4.4))
    for index, plan in enumerate(plans):
        color, marker = ordered_color(index, len(plans)), MARKERS[index % len(MARKERS)]
        _draw_plan(panel, plan, demand, color, marker)
    panel.set_yscale("log")
    panel.set_ylim(bottom=1 / 60)
    panel.set_xlabel("load: arrivals per hour over capacity (%)", fontsize=9)
    panel.set_ylabel("wait (minutes)", fontsize=9)
    panel.set_title("Waiting time over load, Poisson arrivals", fontsize=9.5)
    panel.legend(fontsize=8, frameon=False)
    tidy(panel)
    return figure


def _draw_plan(panel: Any, plan: QueuePlan, demand: Demand, color: Any, marker: str) -> None:
    capacity = capacity_of(plan, demand)
    subjects = max(2000, min(demand.subjects, _PLOTTED_SUBJECTS))
    sample = replace(demand, subjects=subjects, arrivals=())
    results = [forecast(plan, replace(sample, rate=load * capacity)) for load in LOADS]
    waits, loads = [result["wait"] for result in results], [100 * load for load in LOADS]
    means = [wait["mean"] / 60 for wait in waits]
    ends = [(wait["mean"] - (wait["low"] or 0.0)) / 60 for wait in waits]
    name = counted(plan.workers, "worker")
    style = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none"}
    panel.errorbar(loads, means, ends, capsize=2, label=f"{name}, mean", **style)
    high = [wait["p90"] / 60 or math.nan for wait in waits]
    panel.plot(loads, high, color=color, linestyle=":", linewidth=1.2, label=f"{name}, p90")
    formulas = [result["wait_by_formula"] for result in results]
    if None not in formulas:
        kind = "formula" if results[0]["formula_is_exact"] else "approximation"
        minutes = [seconds / 60 for seconds in formulas]
        panel.plot(loads, minutes, color=color, linewidth=1.2, label=f"{name}, {kind}")
