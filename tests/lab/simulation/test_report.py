"""Forecasts, where a formula applies, and the plot."""

from __future__ import annotations

import numpy as np
import pytest

from dora_diffusion.lab.simulation import report
from dora_diffusion.lab.simulation.plan import Demand, TrainingTimes
from dora_diffusion.lab.simulation.queue import QueuePlan

FIXED = TrainingTimes(100)


@pytest.mark.parametrize(
    ("plan", "times", "expected", "is_exact"),
    [
        # M/D/1 with a start of 20 s: 120 s at half load wait 60 s on average.
        (QueuePlan(warm_start=20), FIXED, 60.0, True),
        # The start does not vary: less spread in means.
        (QueuePlan(warm_start=20), TrainingTimes(100, 1), 60 * (1 + (100 / 120) ** 2), True),
        (QueuePlan(workers=2, warm_start=20), FIXED, None, False),
        (QueuePlan(failures=1), FIXED, "none", True),
        (QueuePlan(keep_warm=1), FIXED, "none", True),
        (QueuePlan(pack=2, pack_throughput={2: 2}), FIXED, "none", True),
    ],
)
def test_the_formula_is_that_of_what_is_served(plan, times, expected, is_exact):
    demand = Demand(times, 400, rate=15)
    found = report.forecast(plan, demand)
    assert found["formula_is_exact"] is is_exact
    if expected == "none":
        assert found["wait_by_formula"] is None
    elif expected is not None:
        assert found["wait_by_formula"] == pytest.approx(expected)


def test_the_capacity_of_packs_is_that_of_full_ones():
    plan = QueuePlan(workers=2, warm_start=10, pack=4, pack_throughput={4: 2.5}, window=60)
    capacity = report.capacity_of(plan, Demand(FIXED, 10))
    assert capacity == pytest.approx(2 * 4 * 3600 / (10 + 400 / 2.5))


def test_the_capacity_counts_failures():
    sure, failing = (
        report.capacity_of(QueuePlan(failures=rate, recovery=100), Demand(FIXED, 10))
        for rate in (0, 4)
    )
    # A try of 100 s fails one time in ten, half way, and takes 150 s then.
    assert sure == pytest.approx(36)
    assert 0.8 < failing / sure < 0.92


def test_training_times_do_not_depend_on_how_subjects_arrive():
    times = TrainingTimes(100, 1)
    at_once, at_a_rate = (Demand(times, 50, rate).draw() for rate in (None, 10))
    assert np.array_equal(at_once[1], at_a_rate[1])
    assert not at_once[0].any()


def test_the_plot_has_simulated_points_and_the_formula_beside(monkeypatch):
    monkeypatch.setattr(report, "LOADS", (0.5, 0.8))
    monkeypatch.setattr(report, "_PLOTTED_SUBJECTS", 2000)
    plans = [QueuePlan(workers=count) for count in (1, 2)]
    figure = report.plot(plans, Demand(TrainingTimes(60, 1), 2000, rate=1))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["1 worker, formula"].get_ydata() == pytest.approx([1.0, 4.0], rel=0.15)
    labels = set(figure.axes[0].get_legend_handles_labels()[1])
    assert {"1 worker, mean", "2 workers, mean", "2 workers, p90", "2 workers, formula"} <= labels
