"""Queues and restarts that have a formula: what `queue` is held against and plots show."""

from __future__ import annotations

import math


def erlang_c(load: float, workers: int) -> float:
    """The probability that a subject has to wait in M/M/c (Erlang, 1917).

    Args:
        load: Arrivals per second times seconds of service, below ``workers``.
        workers: How many there are.
    """
    # Erlang B by its recursion, which does not overflow as factorials do.
    blocked = 1.0
    for count in range(1, workers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


def expected_wait(rate: float, seconds: float, variation: float, workers: int) -> float:
    """The mean wait for the first of ``workers``, Poisson arrivals, first come, first served.

    Exact for one worker (M/G/1: Pollaczek and Khinchine), and for any number if service times are
    exponential (M/M/c: Erlang C); else the approximation of Allen and Cunneen, within some percent.

    Args:
        rate: Arrivals per second.
        seconds: Mean service time.
        variation: Its standard deviation, in means.
        workers: How many there are.

    Returns:
        Seconds; infinity where the queue grows without end.
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
    """The mean time to the end of a training that fails, and resumes from its last checkpoint.

    Each stretch between checkpoints is repeated until it passes (Daly, 2006, without the time that
    saving takes, and with failures while restarting).

    Args:
        seconds: Training time without failures.
        failures: Per second, at random (a Poisson process).
        start: Before the first step.
        restart: The same, after a failure.
        interval: Training time from one checkpoint to the next; 0 saves none.
        recovery: From a failure to the restart.
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
