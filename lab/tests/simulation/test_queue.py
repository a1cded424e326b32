"""A simulated queue beside recursions, formulas of queueing theory, and examples by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dora_diffusion.evaluation.statistics import t_quantile
from lab.simulation.forecasts import (
    TrainingTimes,
    check_failures,
    expected_completion,
    mean_of,
    settled,
)
from lab.simulation.queue import HOUR, QueuePlan, leave_times, simulate_queue
from tests.refusal import refused


def poisson(load, workers, variation, count, seed):
    """Arrival and service times of mean 1."""
    generator = np.random.default_rng(seed)
    arrivals = generator.exponential(1 / (load * workers), count).cumsum()
    return arrivals, TrainingTimes(1.0, variation).draw(count, generator)


def assert_mean(values, expected, *, batches=20, precision=0.25):
    """Within the interval at 99.9% of batch means, which is no wider than so."""
    means = [float(batch.mean()) for batch in np.array_split(np.asarray(values, float), batches)]
    half = t_quantile(batches - 1, 0.9995) * np.std(means, ddof=1) / math.sqrt(batches)
    assert half < precision * expected
    assert abs(np.mean(means) - expected) < half


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_wait_is_that_of_the_recursion_of_kiefer_and_wolfowitz(workers):
    arrivals, work = poisson(0.9, workers, 1.5, 2000, seed=workers)
    free, expected = np.zeros(workers), []
    for arrival, seconds in zip(arrivals, work, strict=True):
        begins = max(arrival, free[0])
        expected.append(begins - arrival)
        free[0] = begins + seconds
        free.sort()
    outcome = simulate_queue(QueuePlan(workers=workers), arrivals, work)
    np.testing.assert_allclose(outcome.waits, expected, atol=1e-9)
    np.testing.assert_allclose(outcome.turnarounds, expected + work, atol=1e-9)
    assert outcome.training == pytest.approx(work.sum())
    # No worker is given back: each is paid for until the last subject ends.
    assert outcome.worker_seconds == pytest.approx(workers * outcome.seconds)


def probability_of_waiting(load, workers):
    """Erlang C as textbooks have it."""
    terms = [load**k / math.factorial(k) for k in range(workers)]
    last = load**workers / math.factorial(workers) * workers / (workers - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("workers", "load"), [(1, 0.5), (1, 0.8), (2, 0.7), (4, 0.85), (16, 0.8)])
def test_exponential_service_waits_as_erlang_has_it(workers, load):
    arrivals, work = poisson(load, workers, 1.0, 25_000, seed=1)
    waits = settled(simulate_queue(QueuePlan(workers=workers), arrivals, work).waits)
    waiting = probability_of_waiting(load * workers, workers)
    assert_mean(waits > 0, waiting)
    assert_mean(waits, waiting / (workers - load * workers), precision=0.4)


def test_its_own_interval_holds_the_formula_about_as_often_as_it_says():
    workers, load, held = 2, 0.6, 0
    expected = probability_of_waiting(1.2, 2) / (workers - load * workers)
    for seed in range(30):
        arrivals, work = poisson(load, workers, 1.0, 2500, seed)
        waits = settled(simulate_queue(QueuePlan(workers=workers), arrivals, work).waits)
        interval = mean_of(waits)
        held += interval.low <= expected <= interval.high
    assert held >= 25


@pytest.mark.parametrize("variation", [0.0, 0.5, 2.0])
def test_one_worker_waits_as_pollaczek_and_khinchine_have_it(variation):
    load = 0.7
    arrivals, work = poisson(load, 1, variation, 25_000, seed=2)
    waits = settled(simulate_queue(QueuePlan(), arrivals, work).waits)
    second_moment = 1 + variation**2
    assert_mean(waits, load * second_moment / (2 * (1 - load)), precision=0.4)


@pytest.mark.parametrize("interval", [0.0, 120.0, 250.0])
def test_failures_cost_what_the_formula_of_restarts_has(interval):
    plan = QueuePlan(
        cold_start=60, warm_start=5, failures=6, checkpoint_seconds=interval, recovery=30
    )
    count, work = 2000, 600.0
    ends = simulate_queue(plan, [0.0] * count, [work] * count, seed=3).turnarounds
    expected = expected_completion(
        work, 6 / HOUR, start=5, restart=60, interval=interval, recovery=30
    )
    # The first starts cold.
    assert_mean(np.diff(ends), expected, precision=0.1)


def test_preemption_with_notice_loses_starts_alone():
    plan = QueuePlan(cold_start=60, warm_start=60, preemptions=6, preempted_for=300)
    count, work, rate = 2000, 600.0, 6 / HOUR
    outcome = simulate_queue(plan, [0.0] * count, [work] * count, seed=4)
    assert outcome.lost == 0
    assert outcome.training == pytest.approx(count * work)
    start = math.expm1(rate * 60) * (1 / rate + 300)
    expected = start + work + rate * work * (300 + start)
    assert_mean(np.diff(outcome.turnarounds), expected, precision=0.1)


def test_a_worker_that_is_away_is_paid_for_after_a_failure_alone():
    failing = QueuePlan(failures=10, recovery=100, checkpoint_seconds=1)
    outcome = simulate_queue(failing, [0.0] * 200, [60.0] * 200, seed=5)
    assert outcome.recovering > 0
    assert outcome.worker_seconds == pytest.approx(outcome.seconds, rel=1e-3)
    taken = QueuePlan(preemptions=10, preempted_for=100)
    outcome = simulate_queue(taken, [0.0] * 200, [60.0] * 200, seed=5)
    assert outcome.recovering == 0
    assert outcome.worker_seconds < outcome.seconds - 1000


class TestPacks:
    def test_subjects_leave_as_they_end(self):
        # Three share 1.5 of one's speed until the first has its 100 s, and so on.
        expected = [100 * 3 / 1.5, 200 + 100 * 2 / 1.25, 360 + 300]
        assert leave_times([100, 200, 500], [0, 1, 1.25, 1.5]) == pytest.approx(expected)

    def test_a_backlog_ends_at_the_rate_of_full_packs(self):
        plan = QueuePlan(workers=2, warm_start=10, cold_start=10, pack=4, pack_throughput={4: 2.5})
        outcome = simulate_queue(plan, [0.0] * 80, [100.0] * 80)
        assert outcome.packs == 20
        assert outcome.seconds == pytest.approx(10 * (10 + 400 / 2.5))

    def test_a_size_between_those_that_are_named_is_interpolated(self):
        plan = QueuePlan(pack=4, pack_throughput={2: 1.8, 4: 3.0, 8: 4.0})
        assert plan.throughput() == pytest.approx([0, 1, 1.8, 2.4, 3.0])

    def test_a_window_waits_for_a_full_pack(self):
        plan = QueuePlan(workers=2, pack=2, pack_throughput={2: 2.0}, window=30)
        outcome = simulate_queue(plan, [0, 10, 50, 100, 140], [60] * 5)
        # Full at 10; then alone when its time is up, twice; the last too.
        assert outcome.waits.tolist() == [10, 0, 30, 30, 30]
        assert outcome.packs == 4

    def test_who_is_interrupted_has_what_it_was_trained(self):
        """A pack without a gain takes as long as its subjects in turn, however it is cut."""
        plan = QueuePlan(workers=3, pack=4, pack_throughput={4: 1.0}, preemptions=20)
        work = np.random.default_rng(6).gamma(2, 200, 300)
        outcome = simulate_queue(plan, [0.0] * 300, work, seed=6)
        assert outcome.interruptions > 100
        assert outcome.training == pytest.approx(work.sum())

    def test_with_failures_too(self):
        """With checkpoints at every moment, nothing is lost either."""
        plan = QueuePlan(pack=4, pack_throughput={4: 1.0}, failures=20, checkpoint_seconds=1e-6)
        work = np.random.default_rng(7).gamma(2, 200, 300)
        outcome = simulate_queue(plan, [0.0] * 300, work, seed=7)
        assert outcome.training == pytest.approx(work.sum())
        without = simulate_queue(
            QueuePlan(pack=4, pack_throughput={4: 1.0}, failures=3), [0.0] * 300, work, seed=7
        )
        assert without.training - without.lost < work.sum() < without.training


def test_who_has_trained_last_is_taken_first():
    plan = QueuePlan(workers=2, cold_start=30, warm_start=2)
    outcome = simulate_queue(plan, [0, 100], [10, 10])
    assert outcome.turnarounds.tolist() == [40, 12]


def test_who_is_interrupted_comes_before_those_who_wait():
    plan = QueuePlan(failures=20, recovery=5)
    outcome = simulate_queue(plan, np.zeros(40), np.full(40, 60), seed=3)
    assert outcome.interruptions > 5
    assert np.all(np.diff(outcome.turnarounds) > 0)


def test_who_was_idle_for_long_is_given_back_and_starts_cold():
    plan = QueuePlan(cold_start=50, warm_start=5, keep_warm=200)
    outcome = simulate_queue(plan, [0, 100, 1000], [10, 10, 10])
    assert (outcome.turnarounds).tolist() == [60, 15, 60]
    assert (outcome.starting, outcome.training, outcome.idle) == (105, 30, 40 + 200)
    kept = simulate_queue(QueuePlan(cold_start=50, warm_start=5), [0, 100, 1000], [10, 10, 10])
    assert kept.turnarounds.tolist() == [60, 15, 15]
    assert kept.idle == 40 + 885


def test_the_same_seed_gives_the_same_numbers():
    plan = QueuePlan(workers=3, failures=5, preemptions=5, recovery=10, checkpoint_seconds=60)
    first, again, other = (
        simulate_queue(plan, range(0, 3000, 10), [200] * 300, seed).turnarounds
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("workers", {"workers": 0}),
        ("cold_start", {"cold_start": -1}),
        ("failures", {"failures": math.nan}),
        ("pack_throughput", {"pack": 4}),
        ("pack_throughput", {"pack": 4, "pack_throughput": {2: 1.5}}),
        ("pack_throughput of 2", {"pack": 2, "pack_throughput": {2: 0}}),
    ],
)
def test_what_cannot_be_is_refused(setting, values):
    with refused(setting):
        QueuePlan(**values)


def test_workers_that_fail_before_anything_is_kept_are_refused():
    plan = QueuePlan(failures=60, cold_start=300)
    with refused("failures", "takes 600 s from a start"):
        check_failures(plan, 300)
    check_failures(QueuePlan(failures=60, cold_start=30, checkpoint_seconds=20), 300)


@pytest.mark.parametrize(
    ("arrivals", "work"), [([], []), ([0.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0])]
)
def test_times_that_are_none_are_refused(arrivals, work):
    with pytest.raises(ValueError, match="arrivals"):
        simulate_queue(QueuePlan(), arrivals, work)
