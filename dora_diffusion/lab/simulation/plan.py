"""The workers of a fleet, and what happens to them, as `queue` simulates it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dora_diffusion.config.fields import require, require_positive

HOUR = 3600.0
# A plan in which a training takes so many times as long as without failures is refused.
_HOPELESS = 100


@dataclass(frozen=True)
class QueuePlan:
    """The workers of a fleet, and what happens to them.

    Attributes:
        workers: How many there are.
        cold_start: From taking a subject to its first step in a new process.
        warm_start: The same where the process has trained before, with the base in memory.
        pack: Most subjects that a worker trains at once.
        pack_throughput: Size of a pack -> subject-steps per second, relative to one subject alone.
            Linear between the sizes; 1 for one subject.
        window: How long the oldest subject waits for a pack to fill.
        failures: Of a worker, without notice: what was trained since the last checkpoint is lost.
        checkpoint_seconds: Training time from one checkpoint to the next; 0 saves none.
        recovery: From a failure to the new process, which starts cold.
        preemptions: Of a worker, with notice: a checkpoint is saved, and nothing is lost.
        preempted_for: From a preemption to the next worker, which starts cold.
        keep_warm: Idle time after which a worker is given back; None keeps it.
    """

    workers: int = 1
    cold_start: float = 0.0
    warm_start: float = 0.0
    pack: int = 1
    pack_throughput: Mapping[int, float] = field(default_factory=dict)
    window: float = 0.0
    failures: float = 0.0
    checkpoint_seconds: float = 0.0
    recovery: float = 0.0
    preemptions: float = 0.0
    preempted_for: float = 0.0
    keep_warm: float | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "pack"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1", name)
        for name in (
            "cold_start", "warm_start", "window", "failures", "checkpoint_seconds", "recovery",
            "preemptions", "preempted_for", "keep_warm",
        ):  # fmt: skip
            value = getattr(self, name)
            is_valid = value is None or (math.isfinite(value) and value >= 0)
            require(is_valid, f"{name} is {value}; it must be a number, and not negative", name)
        known = self.pack_throughput
        for size, factor in known.items():
            require(size >= 1, f"pack_throughput names a pack of {size}", "pack_throughput")
            require_positive(f"pack_throughput of {size}", factor)
        require(
            self.pack == 1 or max(known, default=0) >= self.pack,
            f"packs of {self.pack} need pack_throughput, such as {self.pack}:2.5: subject-steps "
            "per second of a full pack, where one subject alone has 1",
            "pack_throughput",
        )

    def throughput(self) -> list[float]:
        """Subject-steps per second by the size of a pack, from 0 on, where one alone has 1."""
        known = {0: 0.0, 1: 1.0, **self.pack_throughput}
        sizes = sorted(known)
        factors = np.interp(range(self.pack + 1), sizes, [known[size] for size in sizes])
        return [float(factor) for factor in factors]


def check_failures(plan: QueuePlan, seconds: float) -> None:
    """Refuse a plan whose workers fail so often that training hardly ends.

    Args:
        plan: The workers.
        seconds: Mean training time of a subject alone.

    Raises:
        ConfigError: With how long a training would take.
    """
    whole = plan.cold_start + seconds
    # Beyond it the exponential overflows.
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
        f"failures is {plan.failures} per worker and hour, and from a start to what is kept it "
        f"takes {plan.cold_start + stretch:.0f} s: subjects would hardly end; lower failures or "
        "checkpoint_seconds",
        "failures",
    )


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
