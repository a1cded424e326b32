"""Formulas beside sums, integrals and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dora_diffusion.lab.simulation.plan import erlang_c, expected_completion, expected_wait


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
