"""Formulas beside sums and each other; costs, draws, and arrivals; forecasts, and their plot."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lab.simulation import forecasts
from lab.simulation.forecasts import (
    Demand,
    TrainingTimes,
    erlang_c,
    expected_completion,
    expected_wait,
    read_arrivals,
    read_costs,
)
from lab.simulation.queue import QueuePlan
from tests.refusal import refused


@pytest.mark.parametrize(("load", "workers"), [(0.5, 1), (1.7, 2), (9.0, 12)])
def test_the_probability_of_waiting_is_that_of_the_balance_equations(load, workers):
    """A chain of 2,000 states: births at the load, deaths by as many as are busy."""
    weights = [1.0]
    for state in range(1, 2000):
        weights.append(weights[-1] * load / min(state, workers))
    assert erlang_c(load, workers) == pytest.approx(sum(weights[workers:]) / sum(weights))


def test_many_workers_do_not_overflow():
    assert 0 < erlang_c(980.0, 1000) < 1


def test_waits_of_one_worker():
    # M/M/1 at half load waits as long as it serves; M/D/1 half of that.
    assert expected_wait(0.5, 1.0, 1.0, 1) == pytest.approx(1.0)
    assert expected_wait(0.5, 1.0, 0.0, 1) == pytest.approx(0.5)
    assert expected_wait(2.0, 1.0, 1.0, 2) == math.inf


def test_without_failures_a_training_takes_its_time():
    assert expected_completion(600, 0.0, start=20) == 620
    assert expected_completion(600, 1e-9, start=20, interval=100) == pytest.approx(620, rel=1e-5)


def test_a_whole_restart_is_the_textbook_formula():
    rate, seconds = 1 / 500, 600
    assert expected_completion(seconds, rate) == pytest.approx(math.expm1(rate * seconds) / rate)


def test_stretches_are_tried_until_they_pass():
    """By drawing: 700 s in stretches of 300, which a failure takes back."""
    generator, rate = np.random.default_rng(0), 1 / 400
    totals = []
    for _ in range(5000):
        total, before = 0.0, 20.0
        for stretch in (300, 300, 100):
            while (failure := generator.exponential(1 / rate)) < before + stretch:
                total, before = total + failure + 50, 90.0
            total, before = total + before + stretch, 0.0
        totals.append(total)
    expected = expected_completion(700, rate, start=20, restart=90, interval=300, recovery=50)
    error = np.std(totals) / math.sqrt(len(totals))
    assert abs(np.mean(totals) - expected) < 3.3 * error
    assert error < 0.02 * expected


RECORDS = [
    # name, status, worker, start, training, attempts
    ("a", "failed", "w1", 9.0, 0.0, 1),
    ("b", "done", "w1", 30.0, 100.0, 1),
    ("c", "done", "w2", 40.0, 140.0, 1),
    ("d", "done", "w1", 2.0, 120.0, 2),
    ("e", "done", "w2", 4.0, 120.0, 1),
    ("a", "done", "w1", 3.0, 120.0, 2),
]


def write(path, records):
    names = ("name", "status", "worker", "start_seconds", "train_seconds", "attempts")
    lines = [json.dumps(dict(zip(names, record, strict=True))) for record in records]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_a_record_file_gives_times_starts_and_failures(tmp_path):
    costs = read_costs(write(tmp_path / "fleet.jsonl", RECORDS))
    # Of the subject that failed first its last line counts.
    assert sorted(costs.times.measured) == [100, 120, 120, 120, 140]
    assert costs.times.mean == 120
    assert costs.times.variation == pytest.approx(np.std([100, 120, 120, 120, 140]) / 120)
    assert (costs.cold_start, costs.warm_start) == (35, 3)
    assert costs.failures == pytest.approx(2 / (679 / 3600))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no subject that is done"),
        ('{"name": "a", "status": "failed"}', "no subject that is done"),
        ('{"name": "a", "status": "done", "start_seconds": 1}', "train_seconds"),
        ("[1]", "line 1 of "),
        ("nothing", "line 1 of "),
    ],
)
def test_what_is_no_record_file_is_refused(tmp_path, text, message):
    path = tmp_path / "fleet.jsonl"
    path.write_text(text, encoding="utf-8")
    with refused("records", message):
        read_costs(path)


@pytest.mark.parametrize("variation", [0.3, 1.0, 2.0])
def test_drawn_times_have_their_mean_and_spread(variation):
    drawn = TrainingTimes(50, variation).draw(100_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(50, rel=0.03)
    assert drawn.std() == pytest.approx(50 * variation, rel=0.03)
    if variation == 1:  # exponential
        assert np.mean(drawn > 50) == pytest.approx(np.exp(-1), abs=0.01)


def test_times_that_are_all_the_same_are_not_drawn():
    assert TrainingTimes(50).draw(3, np.random.default_rng(0)).tolist() == [50, 50, 50]


def test_measured_times_are_drawn_from():
    drawn = TrainingTimes.of([10, 20]).draw(1000, np.random.default_rng(0))
    assert set(drawn) == {10, 20}


def test_arrivals_are_seconds_or_dates(tmp_path):
    path = tmp_path / "arrivals.txt"
    path.write_text("# of a day\n30\n10.5  # the first\n\n20\n", encoding="utf-8")
    assert read_arrivals(path) == [0, 9.5, 19.5]
    path.write_text("2026-01-31T12:01:00+00:00\n2026-01-31T12:00:00+00:00\n", encoding="utf-8")
    assert read_arrivals(path) == [0, 60]


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\nsoon", "line 2 of "), ("nan", "line 1"), ("\n", "no arrival")],
)
def test_what_is_no_time_is_refused(tmp_path, text, message):
    path = tmp_path / "arrivals.txt"
    path.write_text(text, encoding="utf-8")
    with refused("arrivals", message):
        read_arrivals(path)


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
    found = forecasts.forecast(plan, demand)
    assert found["formula_is_exact"] is is_exact
    if expected == "none":
        assert found["wait_by_formula"] is None
    elif expected is not None:
        assert found["wait_by_formula"] == pytest.approx(expected)


def test_the_capacity_of_packs_is_that_of_full_ones():
    plan = QueuePlan(workers=2, warm_start=10, pack=4, pack_throughput={4: 2.5}, window=60)
    capacity = forecasts.capacity_of(plan, Demand(FIXED, 10))
    assert capacity == pytest.approx(2 * 4 * 3600 / (10 + 400 / 2.5))


def test_the_capacity_counts_failures():
    sure, failing = (
        forecasts.capacity_of(QueuePlan(failures=rate, recovery=100), Demand(FIXED, 10))
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
    monkeypatch.setattr(forecasts, "LOADS", (0.5, 0.8))
    monkeypatch.setattr(forecasts, "_PLOTTED_SUBJECTS", 2000)
    plans = [QueuePlan(workers=count) for count in (1, 2)]
    figure = forecasts.plot(plans, Demand(TrainingTimes(60, 1), 2000, rate=1))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["1 worker, formula"].get_ydata() == pytest.approx([1.0, 4.0], rel=0.15)
    labels = set(figure.axes[0].get_legend_handles_labels()[1])
    assert {"1 worker, mean", "2 workers, mean", "2 workers, p90", "2 workers, formula"} <= labels
