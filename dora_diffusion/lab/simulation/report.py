"""Report on a simulated queue: tables, JSON, and waiting time over load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_diffusion.config.wording import aligned, counted, duration
from dora_diffusion.evaluation.statistics import Interval, t_interval
from dora_diffusion.lab.analysis.plots import MARKERS, ordered_color, tidy
from dora_diffusion.lab.simulation.plan import Demand, expected_wait
from dora_diffusion.lab.simulation.queue import HOUR, QueuePlan, Values, simulate_queue

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


def forecast(plan: QueuePlan, demand: Demand) -> dict[str, Any]:
    """Simulate a queue; returns its figures, for JSON, and the formula's where one applies.

    The mean wait leaves the warm-up out, and has its interval by batch means. The formula is for
    warm workers, without packs, failures, preemption or workers that are given back. The first,
    cold start of each worker is left out.
    """
    outcome, times = simulate_queue(plan, *demand.draw(), seed=demand.seed), demand.times
    kept = settled if demand.rate is not None else np.asarray
    waits, turnarounds = kept(outcome.waits), kept(outcome.turnarounds)
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
    is_plain = plan.pack == 1 and plan.keep_warm is None
    if is_plain and not plan.failures and not plan.preemptions:
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
    """A forecast with the capacity of its workers and what they cost.

    Args:
        plan: The workers.
        demand: What arrives.
        gpus: Of each worker.
        price: Of a GPU for an hour.
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


def remarks(results: Sequence[dict[str, Any]], demand: Demand) -> list[str]:
    """Return remarks on the table: confidence intervals, formulas, and queues that grow."""
    lines = []
    for result in results:
        who, wait = counted(result["workers"], "worker"), result["wait"]
        if demand.rate is None:
            lines.append(f"{who}: all are done after {duration(result['seconds'])}")
            continue
        load = demand.rate / result["capacity_per_hour"]
        low, high = max(0.0, wait["low"] or 0.0), wait["high"] or wait["mean"]
        line = f"{who}: load {load:.0%}, mean wait {wait['mean']:.1f} s "
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
    some = replace(demand, subjects=subjects, arrivals=())
    found = [forecast(plan, replace(some, rate=load * capacity)) for load in LOADS]
    waits, loads = [result["wait"] for result in found], [100 * load for load in LOADS]
    means = [wait["mean"] / 60 for wait in waits]
    ends = [(wait["mean"] - (wait["low"] or 0.0)) / 60 for wait in waits]
    name = counted(plan.workers, "worker")
    look = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none"}
    panel.errorbar(loads, means, ends, capsize=2, label=f"{name}, mean", **look)
    high = [wait["p90"] / 60 or math.nan for wait in waits]
    panel.plot(loads, high, color=color, linestyle=":", linewidth=1.2, label=f"{name}, p90")
    formulas = [result["wait_by_formula"] for result in found]
    if None not in formulas:
        kind = "formula" if found[0]["formula_is_exact"] else "approximation"
        minutes = [seconds / 60 for seconds in formulas]
        panel.plot(loads, minutes, color=color, linewidth=1.2, label=f"{name}, {kind}")
