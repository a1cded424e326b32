"""Event-driven simulation of a queue of subjects: packs, failures, preemption, cold starts.

Subjects are served in order of arrival. Nothing is trained: the costs of subjects are numbers. All
times are in seconds, all rates per worker and hour.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from dora_diffusion.config.fields import require, require_positive

HOUR = 3600.0
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QueuePlan:
    """Workers of a fleet, with their costs and failures.

    Attributes:
        workers: Number of workers.
        cold_start: Time from taking a subject to its first step in a new process.
        warm_start: The same in a process with the base in memory.
        pack: Maximum number of subjects that a worker trains at once.
        pack_throughput: Size of a pack -> subject-steps per second, relative to a single subject.
            Linear between the sizes; 1 for one subject.
        window: Maximum time that the oldest subject waits for a pack to fill.
        failures: Rate of failures without notice, which lose progress since the last checkpoint.
        checkpoint_seconds: Training time between checkpoints; 0: none are saved.
        recovery: Time from a failure to the new process, which starts cold.
        preemptions: Rate of preemptions with notice, which save a checkpoint first.
        preempted_for: Time from a preemption to the next worker, which starts cold.
        keep_warm: Idle time after which a worker is released; None: never.
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
        for name, value in vars(self).items():
            if name in ("workers", "pack"):
                require(value >= 1, f"{name} is {value}; it must be at least 1", name)
            elif name != "pack_throughput":
                is_valid = value is None or (math.isfinite(value) and value >= 0)
                require(is_valid, f"{name} is {value}; it must be a number, and not negative", name)
        known = self.pack_throughput
        for size, factor in known.items():
            require(size >= 1, f"pack_throughput names a pack of {size}", "pack_throughput")
            require_positive(f"pack_throughput of {size}", factor)
        require(
            self.pack == 1 or max(known, default=0) >= self.pack,
            f"packs of {self.pack} need pack_throughput, such as {self.pack}:2.5: subject-steps "
            "per second of a full pack, relative to a single subject",
            "pack_throughput",
        )

    def throughput(self) -> list[float]:
        """Subject-steps per second by pack size from 0, relative to a single subject."""
        known = {0: 0.0, 1: 1.0, **self.pack_throughput}
        sizes = sorted(known)
        factors = np.interp(range(self.pack + 1), sizes, [known[size] for size in sizes])
        return [float(factor) for factor in factors]


@dataclass(frozen=True)
class QueueOutcome:
    """Results by subject, in order of arrival, and use of the workers' time.

    Attributes:
        waits: Time from arrival to the start on a worker, (subjects,).
        turnarounds: Time from arrival to the end of the training, (subjects,).
        seconds: Time from the first arrival to the last end.
        training: Worker-seconds of training, including lost ones.
        lost: Worker-seconds of training that failures have lost.
        starting: Worker-seconds from taking subjects to their first step.
        idle: Worker-seconds of waiting for subjects, without released workers.
        recovering: Worker-seconds from failures to new processes.
        packs: Number of started packs.
        interruptions: Number of interruptions of subjects, by failures and preemption.
    """

    waits: Values
    turnarounds: Values
    seconds: float
    training: float
    lost: float
    starting: float
    idle: float
    recovering: float
    packs: int
    interruptions: int

    @property
    def worker_seconds(self) -> float:
        """Paid worker-seconds, without preempted or released workers."""
        return self.training + self.starting + self.idle + self.recovering

    @property
    def utilisation(self) -> float:
        """Share of paid worker-seconds in which workers have subjects."""
        return (self.training + self.starting) / self.worker_seconds

    @property
    def subjects_per_hour(self) -> float:
        return len(self.waits) / self.seconds * HOUR


def simulate_queue(
    plan: QueuePlan,
    arrivals: Sequence[float] | Values,
    work: Sequence[float] | Values,
    seed: int = 0,
) -> QueueOutcome:
    """Simulate a queue, first come, first served; results are reproducible by seed.

    Args:
        plan: The workers.
        arrivals: Arrival time of each subject, ascending.
        work: Training time of each subject alone on a worker, without its start.
        seed: Seed of failures and preemption.

    Raises:
        ValueError: If there are no subjects, the numbers of times and arrivals differ, or arrivals
            do not ascend.

    Example:
        >>> outcome = simulate_queue(QueuePlan(workers=2), [0, 0, 0], [60, 60, 60])
        >>> outcome.waits.tolist(), outcome.seconds
        ([0.0, 0.0, 60.0], 120.0)
    """
    require(seed >= 0, f"seed is {seed}; it must not be negative", "seed")
    if not len(arrivals) or len(arrivals) != len(work):
        raise ValueError(f"{len(arrivals)} arrivals and {len(work)} training times")
    if np.any(np.diff(arrivals) < 0):
        raise ValueError("arrivals must ascend")
    return _Simulation(plan, arrivals, work, seed).run()


def leave_times(work: Sequence[float], throughput: Sequence[float]) -> list[float]:
    """Return the times at which the subjects of a pack end, for a pack that starts at 0.

    All subjects train at the same rate, which increases when one ends.

    Args:
        work: Training time of each subject alone, ascending.
        throughput: Throughput by pack size, from 0.
    """
    times, now, done = [], 0.0, 0.0
    for index, seconds in enumerate(work):
        active = len(work) - index
        now += (seconds - done) * active / throughput[active]
        done = seconds
        times.append(now)
    return times


class _Worker:
    """State of a worker process."""

    __slots__ = ("begun", "free_since", "is_warm", "leaves", "subjects", "taken_at", "turn")

    def __init__(self) -> None:
        self.subjects: list[int] = []
        self.leaves: list[float] = []
        self.taken_at = self.begun = self.free_since = 0.0
        self.is_warm = False
        # Incremented with each pack; events of earlier packs are ignored.
        self.turn = 0


class _Simulation:
    """State of a queue, with a handler for each kind of event."""

    def __init__(
        self,
        plan: QueuePlan,
        arrivals: Sequence[float] | Values,
        work: Sequence[float] | Values,
        seed: int,
    ) -> None:
        self.plan, self.throughput = plan, plan.throughput()
        self.generator = np.random.default_rng(seed)
        self.down_rate = (plan.failures + plan.preemptions) / HOUR
        self.arrivals, self.left = [float(a) for a in arrivals], [float(w) for w in work]
        self.taken_at: list[float | None] = [None] * len(self.left)
        self.ended = [0.0] * len(self.left)
        self.unfinished = len(self.left)
        self.sums = dict.fromkeys(("training", "lost", "starting", "idle", "recovering"), 0.0)
        self.packs = self.interruptions = 0
        self.waiting: list[int] = []
        self.next_dispatch = -math.inf
        self.order = itertools.count()
        self.now = self.arrivals[0]
        # A sorted list is a valid heap.
        self.events: list[tuple[float, int, Callable[[], object]]] = [
            (time, next(self.order), partial(heapq.heappush, self.waiting, index))
            for index, time in enumerate(self.arrivals)
        ]
        # Workers are taken from the end, where the most recently busy ones are warm.
        self.idle = [_Worker() for _ in range(plan.workers)]
        for worker in self.idle:
            worker.free_since = self.now
            self._expect_down(worker)

    def run(self) -> QueueOutcome:
        while self.unfinished:
            self.now = self.events[0][0]
            # Handle all events of one time before packs are started.
            while self.events and self.events[0][0] == self.now:
                heapq.heappop(self.events)[2]()
            self._dispatch()
        for worker in self.idle:
            self.sums["idle"] += self._paid_idle(worker)
        arrivals = np.asarray(self.arrivals)
        return QueueOutcome(
            waits=np.asarray(self.taken_at, float) - arrivals,
            turnarounds=np.asarray(self.ended) - arrivals,
            seconds=max(self.ended) - self.arrivals[0],
            packs=self.packs,
            interruptions=self.interruptions,
            **self.sums,
        )

    def _at(self, time: float, handle: Callable[[], object]) -> None:
        heapq.heappush(self.events, (time, next(self.order), handle))

    def _dispatch(self) -> None:
        """Assign waiting subjects to idle workers."""
        while self.idle and self.waiting:
            size = min(self.plan.pack, len(self.waiting))
            ready = self.arrivals[self.waiting[0]] + self.plan.window
            if size < self.plan.pack and self.now < ready:
                if ready != self.next_dispatch:
                    self.next_dispatch = ready
                    self._at(ready, lambda: None)  # `_dispatch` runs after every event.
                return
            self._take(self.idle.pop(), [heapq.heappop(self.waiting) for _ in range(size)])

    def _take(self, worker: _Worker, subjects: list[int]) -> None:
        self.sums["idle"] += self._paid_idle(worker)
        is_warm = worker.is_warm and not self._is_released(worker)
        start = self.plan.warm_start if is_warm else self.plan.cold_start
        subjects.sort(key=self.left.__getitem__)
        worker.subjects = subjects
        worker.leaves = leave_times([self.left[i] for i in subjects], self.throughput)
        worker.taken_at, worker.begun = self.now, self.now + start
        worker.turn += 1
        self.packs += 1
        for subject in subjects:
            if self.taken_at[subject] is None:
                self.taken_at[subject] = self.now
        self._at(worker.begun + worker.leaves[-1], partial(self._done, worker, worker.turn))

    def _done(self, worker: _Worker, turn: int) -> None:
        if worker.turn == turn:
            self._release(worker, worker.leaves[-1])
            worker.is_warm, worker.free_since = True, self.now
            self.idle.append(worker)

    def _release(self, worker: _Worker, kept_seconds: float) -> None:
        """Remove a worker's subjects: complete ended ones, requeue others with kept progress."""
        now, trained = self.now, max(0.0, self.now - worker.begun)
        self.sums["starting"] += min(now, worker.begun) - worker.taken_at
        self.sums["training"] += trained
        ended = sum(worker.begun + leave <= now for leave in worker.leaves)
        for subject, leave in zip(worker.subjects[:ended], worker.leaves, strict=False):
            self.ended[subject] = worker.begun + leave
        self.unfinished -= ended
        if ended < len(worker.subjects):
            self.sums["lost"] += trained - kept_seconds
            # Work done on each remaining subject since the start of the pack.
            work = [self.left[subject] for subject in worker.subjects]
            progress = float(np.interp(kept_seconds, [0.0, *worker.leaves], [0.0, *work]))
            for subject in worker.subjects[ended:]:
                self.left[subject] -= progress
                heapq.heappush(self.waiting, subject)
            self.interruptions += len(worker.subjects) - ended
        worker.subjects = []
        worker.turn += 1

    def _expect_down(self, worker: _Worker) -> None:
        if self.down_rate:
            wait = self.generator.exponential(1 / self.down_rate)
            self._at(self.now + wait, partial(self._down, worker))

    def _down(self, worker: _Worker) -> None:
        plan = self.plan
        is_noticed = self.generator.random() * self.down_rate * HOUR < plan.preemptions
        if worker.subjects:
            trained, interval = max(0.0, self.now - worker.begun), plan.checkpoint_seconds
            saved = trained // interval * interval if interval else 0.0
            self._release(worker, trained if is_noticed else saved)
        elif self._is_released(worker):
            self._expect_down(worker)
            return
        else:
            self.sums["idle"] += self._paid_idle(worker)
            self.idle.remove(worker)
        pause = plan.preempted_for if is_noticed else plan.recovery
        if not is_noticed:
            self.sums["recovering"] += pause
        self._at(self.now + pause, partial(self._up, worker))

    def _up(self, worker: _Worker) -> None:
        worker.is_warm, worker.free_since = False, self.now
        self.idle.insert(0, worker)
        self._expect_down(worker)

    def _is_released(self, worker: _Worker) -> bool:
        keep = self.plan.keep_warm
        return keep is not None and (not worker.is_warm or self.now - worker.free_since > keep)

    def _paid_idle(self, worker: _Worker) -> float:
        if self.plan.keep_warm is None:
            return self.now - worker.free_since
        return min(self.now - worker.free_since, self.plan.keep_warm) if worker.is_warm else 0.0
