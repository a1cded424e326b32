"""Report on a simulated queue: tables, JSON, and waiting time over load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_diffusion.config.wording import aligned, counted, duration
from dora_diffusion.evaluation.statistics import Interval, t_interval
from dora_diffusion.lab.analysis.plots import MARKERS, ordered_color, tidy
from dora_diffusion.lab.simulation.plan import Demand, expected_wait
from dora_diffusion.lab.simulation.queue import (
    HOUR,
    QueueOutcome,
    QueuePlan,
    Values,
    simulate_queue,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (50, 90, 99)
BATCHES = 20
# Of the arrivals at a rate, the first do not count: the queue is empty before them.
WARM_UP = 0.1
LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_PLOTTED_SUBJECTS = 20_000
# Of the table, besides times: title -> figure and its form.
_COLUMNS = {
    "utilisation": ("utilisation", "{:.0%}"),
    "subjects per hour": ("subjects_per_hour", "{:.1f}"),
    "capacity per hour": ("capacity_per_hour", "{:.1f}"),
    "GPU-hours": ("gpu_hours", "{:.1f}"),
}


@dataclass(frozen=True)
class Forecast:
    """A plan, what was simulated of it, and the formula beside.

    Attributes:
        plan: The workers.
        outcome: Of all subjects.
        mean_wait: Over subjects, those of the warm-up left out, with batch means for its interval;
            None where subjects do not arrive at a rate.
        formula: Mean wait by `expected_wait`; None where it does not apply.
        is_exact: Whether the formula is not an approximation.
    """

    plan: QueuePlan
    outcome: QueueOutcome
    mean_wait: Interval | None
    formula: float | None
    is_exact: bool

    def percentiles(self, name: str) -> dict[str, float]:
        """``"p50"`` and so on of waits or turnarounds, in seconds."""
        values = getattr(self.outcome, name)
        values = values if self.mean_wait is None else settled(values)
        return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def forecast(plan: QueuePlan, demand: Demand) -> Forecast:
    """Simulate a queue.

    The formula is for warm workers, without packs, failures, preemption or workers that are given
    back. The first, cold start of each worker is left out.
    """
    outcome, times = simulate_queue(plan, *demand.draw(), seed=demand.seed), demand.times
    mean_wait = formula = None
    if demand.rate is not None:
        mean_wait = mean_of(settled(outcome.waits))
        is_plain = plan.pack == 1 and plan.keep_warm is None
        if is_plain and not plan.failures and not plan.preemptions:
            seconds = plan.warm_start + times.mean
            spread = times.variation * times.mean / seconds
            formula = expected_wait(demand.rate / HOUR, seconds, spread, plan.workers)
    is_exponential = times.variation == 1 and not times.measured and not plan.warm_start
    return Forecast(plan, outcome, mean_wait, formula, plan.workers == 1 or is_exponential)


def settled(values: Values) -> Values:
    """Return the values without the warm-up."""
    return values[int(WARM_UP * len(values)) :]


def mean_of(values: Values) -> Interval:
    """The mean with its interval: subjects near each other wait alike, and batches of many less."""
    batches = np.array_split(values, min(BATCHES, len(values)))
    return replace(t_interval([float(batch.mean()) for batch in batches]), n=len(values))


def capacity_of(plan: QueuePlan, demand: Demand) -> float:
    """Subjects per hour where one always waits: by what ends in the middle of a long backlog."""
    count = max(2000, 40 * plan.workers * plan.pack)
    work = demand.times.draw(count, np.random.default_rng(demand.seed))
    outcome = simulate_queue(plan, [0.0] * count, work, demand.seed)
    ends = np.sort(outcome.turnarounds)
    first, last = count // 5, count - count // 5
    span = ends[last] - ends[first]
    return float((last - first) / span * HOUR) if span else outcome.subjects_per_hour


def to_dict(
    found: Forecast, demand: Demand, gpus: float = 1.0, price: float | None = None
) -> dict[str, Any]:
    """All figures of a plan, for JSON.

    Args:
        found: What was simulated.
        demand: Of what.
        gpus: Of each worker.
        price: Of a GPU for an hour.
    """
    outcome, count = found.outcome, len(found.outcome.waits)
    hours = outcome.worker_seconds / HOUR * gpus
    phases = ("training", "lost", "starting", "idle", "recovering")
    result: dict[str, Any] = {
        "workers": found.plan.workers,
        "subjects": count,
        "seconds": outcome.seconds,
        "capacity_per_hour": capacity_of(found.plan, demand),
        "subjects_per_hour": outcome.subjects_per_hour,
        "wait": found.percentiles("waits"),
        "turnaround": found.percentiles("turnarounds"),
        "utilisation": outcome.utilisation,
        "worker_seconds": {name: getattr(outcome, name) for name in phases},
        "mean_pack": (count + outcome.interruptions) / outcome.packs,
        "interruptions": outcome.interruptions,
        "gpu_hours": hours,
        "cost_per_subject": None if price is None else hours * price / count,
    }
    if found.mean_wait is not None:
        mean = found.mean_wait
        result["wait"] |= {"mean": mean.mean, "low": mean.low, "high": mean.high}
        formula = found.formula
        result["wait_by_formula"] = formula if formula is None or math.isfinite(formula) else None
        result["formula_is_exact"] = found.is_exact
    return result


def table(results: Sequence[dict[str, Any]], *, has_price: bool) -> str:
    """A row for each number of workers."""
    times = [(kind, f"p{p}") for kind in ("wait", "turnaround") for p in PERCENTILES]
    rows = [["workers", *map(" ".join, times), *_COLUMNS]]
    if has_price:
        rows[0].append("cost per subject")
    for result in results:
        row = [str(result["workers"]), *(duration(result[kind][p]) for kind, p in times)]
        row += [form.format(result[key]) for key, form in _COLUMNS.values()]
        rows.append(row + ([f"{result['cost_per_subject']:.4g}"] if has_price else []))
    return aligned(rows)


def remarks(
    forecasts: Sequence[Forecast], results: Sequence[dict[str, Any]], demand: Demand
) -> list[str]:
    """Return remarks on the table: confidence intervals, formulas, and queues that grow."""
    lines = []
    for found, result in zip(forecasts, results, strict=True):
        who = counted(found.plan.workers, "worker")
        if demand.rate is None:
            lines.append(f"{who}: all are done after {duration(result['seconds'])}")
            continue
        load, mean = demand.rate / result["capacity_per_hour"], found.mean_wait
        assert mean is not None
        low, high = max(0.0, mean.low or 0.0), mean.high or mean.mean
        line = f"{who}: load {load:.0%}, mean wait {mean.mean:.1f} s "
        line += f"(95% confidence interval {low:.1f} to {high:.1f} s)"
        if found.formula is not None and math.isfinite(found.formula):
            kind = "by the formula" if found.is_exact else "by the formula's approximation"
            line += f", {kind} {found.formula:.1f} s"
        if load >= 1:
            needed = math.ceil(load * found.plan.workers)
            line += f"; the queue grows without end, more than {needed} workers are needed"
        lines.append(line)
    return lines


def plot(plans: Sequence[QueuePlan], demand: Demand) -> Figure:
    """Mean and p90 of the wait over load, for Poisson arrivals, and the formula where it applies.

    Load is the arrival rate over the capacity.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    panel = figure.subplots()
    for place, plan in enumerate(plans):
        color, marker = ordered_color(place, len(plans)), MARKERS[place % len(MARKERS)]
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
    loads, means, ends, high = [100 * load for load in LOADS], [], [], []
    formulas: list[float] = []
    for load in LOADS:
        rate = load * capacity
        found = forecast(plan, replace(demand, subjects=subjects, rate=rate, arrivals=()))
        mean = found.mean_wait
        assert mean is not None
        means.append(mean.mean / 60)
        ends.append(mean.mean / 60 - (mean.low or 0.0) / 60)
        high.append(found.percentiles("waits")["p90"] / 60 or math.nan)
        if found.formula is not None:
            formulas.append(found.formula / 60)
    name = counted(plan.workers, "worker")
    look = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none"}
    panel.errorbar(loads, means, ends, capsize=2, label=f"{name}, mean", **look)
    panel.plot(loads, high, color=color, linestyle=":", linewidth=1.2, label=f"{name}, p90")
    if formulas:
        kind = "formula" if found.is_exact else "approximation"
        panel.plot(loads, formulas, color=color, linewidth=1.2, label=f"{name}, {kind}")
