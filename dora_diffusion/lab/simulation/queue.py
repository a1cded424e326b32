"""Subjects that wait for workers, event by event: packs, failures, preemption, cold starts.

Subjects are served in the order in which they arrive. Nothing is trained: what a subject costs is
given as numbers. All times are in seconds, all rates per worker and hour.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dora_diffusion.lab.simulation.plan import HOUR, QueuePlan

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QueueOutcome:
    """Outcome of the subjects, in the order in which they arrived, and use of the workers' time.

    Attributes:
        waits: From arrival to when a worker takes the subject, (subjects,).
        turnarounds: From arrival to the end of its training, (subjects,).
        seconds: From the first arrival to the last end.
        training: Worker-seconds of training, with what was lost.
        lost: Of these, what failures have taken back.
        starting: Worker-seconds from taking subjects to their first step.
        idle: Worker-seconds of waiting for subjects, without those of workers given back.
        recovering: Worker-seconds from failures to new processes.
        packs: How many times subjects were taken.
        interruptions: Of subjects, by failures and preemption.
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
        """Paid worker-seconds: all but the time of workers that were preempted or given back."""
        return self.training + self.starting + self.idle + self.recovering

    @property
    def utilisation(self) -> float:
        """The share of it in which workers have subjects."""
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
    """Serve subjects, first come, first served; the same numbers for the same seed.

    Args:
        plan: The workers.
        arrivals: When each subject arrives, ascending.
        work: What its training takes alone on a worker, without its start.
        seed: Of failures and preemption.

    Raises:
        ValueError: If there are no subjects, or not as many times as arrivals, or these descend.

    Example:
        >>> outcome = simulate_queue(QueuePlan(workers=2), [0, 0, 0], [60, 60, 60])
        >>> outcome.waits.tolist(), outcome.seconds
        ([0.0, 0.0, 60.0], 120.0)
    """
    if not len(arrivals) or len(arrivals) != len(work):
        raise ValueError(f"{len(arrivals)} arrivals and {len(work)} training times")
    if np.any(np.diff(arrivals) < 0):
        raise ValueError("arrivals must ascend")
    return _Simulation(plan, arrivals, work, seed).run()


def leave_times(work: Sequence[float], throughput: Sequence[float]) -> list[float]:
    """Return the times at which the subjects of a pack end that starts at 0.

    All are trained at one rate, and the others continue faster when one leaves.

    Args:
        work: What each takes alone, ascending.
        throughput: Of packs by their size, from 0 on.
    """
    times, now, done = [], 0.0, 0.0
    for place, seconds in enumerate(work):
        active = len(work) - place
        now += (seconds - done) * active / throughput[active]
        done = seconds
        times.append(now)
    return times


class _Worker:
    """A process: what it trains, and since when."""

    __slots__ = ("begun", "free_since", "is_warm", "leaves", "subjects", "taken", "turn")

    def __init__(self) -> None:
        self.subjects: list[int] = []
        self.leaves: list[float] = []
        self.taken = self.begun = self.free_since = 0.0
        self.is_warm = False
        # Raised with each pack: an event that names an earlier one has been overtaken.
        self.turn = 0


class _Simulation:
    """The state of a queue, and a handler for each kind of event."""

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
        self.taken: list[float | None] = [None] * len(self.left)
        self.ended = [0.0] * len(self.left)
        self.unfinished = len(self.left)
        self.sums = dict.fromkeys(("training", "lost", "starting", "idle", "recovering"), 0.0)
        self.packs = self.interruptions = 0
        self.waiting: list[int] = []
        self.next_look = -math.inf
        self.order = itertools.count()
        # An ascending list is a heap.
        self.events: list[tuple[float, int, Callable[[float, Any], None], Any]] = [
            (time, next(self.order), self._arrive, place)
            for place, time in enumerate(self.arrivals)
        ]
        self.now = self.arrivals[0]
        # The last is taken first: who was busy last is warm.
        self.idle = [_Worker() for _ in range(plan.workers)]
        for worker in self.idle:
            worker.free_since = self.now
            self._expect_down(self.now, worker)

    def run(self) -> QueueOutcome:
        while self.unfinished:
            self.now = self.events[0][0]
            # All that happens at one moment is known before a pack is made of it.
            while self.events and self.events[0][0] == self.now:
                _, _, handle, what = heapq.heappop(self.events)
                handle(self.now, what)
            self._dispatch(self.now)
        for worker in self.idle:
            self.sums["idle"] += self._paid_idle(worker, self.now)
        arrivals = np.asarray(self.arrivals)
        return QueueOutcome(
            waits=np.asarray(self.taken, float) - arrivals,
            turnarounds=np.asarray(self.ended) - arrivals,
            seconds=max(self.ended) - self.arrivals[0],
            packs=self.packs,
            interruptions=self.interruptions,
            **self.sums,
        )

    def _at(self, time: float, handle: Callable[[float, Any], None], what: Any = None) -> None:
        heapq.heappush(self.events, (time, next(self.order), handle, what))

    def _arrive(self, now: float, subject: int) -> None:
        heapq.heappush(self.waiting, subject)

    def _look(self, now: float, what: None) -> None:
        """The window of a pack has passed; `_dispatch` follows every event."""

    def _dispatch(self, now: float) -> None:
        """Assign waiting subjects to idle workers."""
        while self.idle and self.waiting:
            size = min(self.plan.pack, len(self.waiting))
            if size < self.plan.pack:
                ready = self.arrivals[self.waiting[0]] + self.plan.window
                if now < ready:
                    if ready != self.next_look:
                        self.next_look = ready
                        self._at(ready, self._look)
                    return
            subjects = [heapq.heappop(self.waiting) for _ in range(size)]
            self._take(self.idle.pop(), subjects, now)

    def _take(self, worker: _Worker, subjects: list[int], now: float) -> None:
        self.sums["idle"] += self._paid_idle(worker, now)
        is_warm = worker.is_warm and not self._is_given_back(worker, now)
        start = self.plan.warm_start if is_warm else self.plan.cold_start
        subjects.sort(key=self.left.__getitem__)
        worker.subjects = subjects
        worker.leaves = leave_times([self.left[i] for i in subjects], self.throughput)
        worker.taken, worker.begun = now, now + start
        worker.turn += 1
        self.packs += 1
        for subject in subjects:
            if self.taken[subject] is None:
                self.taken[subject] = now
        self._at(worker.begun + worker.leaves[-1], self._done, (worker, worker.turn))

    def _done(self, now: float, what: tuple[_Worker, int]) -> None:
        worker, turn = what
        if worker.turn == turn:
            self._release(worker, now, worker.leaves[-1])
            worker.is_warm, worker.free_since = True, now
            self.idle.append(worker)

    def _release(self, worker: _Worker, now: float, kept: float) -> None:
        """Remove a worker's subjects: those that have ended, and others as far as is kept."""
        self.sums["starting"] += min(now, worker.begun) - worker.taken
        self.sums["training"] += max(0.0, now - worker.begun)
        ended = sum(worker.begun + leave <= now for leave in worker.leaves)
        for subject, leave in zip(worker.subjects[:ended], worker.leaves, strict=False):
            self.ended[subject] = worker.begun + leave
        self.unfinished -= ended
        if ended < len(worker.subjects):
            self.sums["lost"] += max(0.0, now - worker.begun) - kept
            progress = self._progress(worker, kept)
            for subject in worker.subjects[ended:]:
                self.left[subject] -= progress
                heapq.heappush(self.waiting, subject)
            self.interruptions += len(worker.subjects) - ended
        worker.subjects = []
        worker.turn += 1

    def _progress(self, worker: _Worker, elapsed: float) -> float:
        """Return the work done on each remaining subject of a pack since its start."""
        work = [self.left[subject] for subject in worker.subjects]
        return float(np.interp(elapsed, [0.0, *worker.leaves], [0.0, *work]))

    def _expect_down(self, now: float, worker: _Worker) -> None:
        if self.down_rate:
            self._at(now + self.generator.exponential(1 / self.down_rate), self._down, worker)

    def _down(self, now: float, worker: _Worker) -> None:
        plan = self.plan
        is_noticed = self.generator.random() * self.down_rate * HOUR < plan.preemptions
        if worker.subjects:
            trained, every = max(0.0, now - worker.begun), plan.checkpoint_seconds
            saved = trained // every * every if every else 0.0
            self._release(worker, now, trained if is_noticed else saved)
        elif self._is_given_back(worker, now):
            self._expect_down(now, worker)
            return
        else:
            self.sums["idle"] += self._paid_idle(worker, now)
            self.idle.remove(worker)
        away = plan.preempted_for if is_noticed else plan.recovery
        if not is_noticed:
            self.sums["recovering"] += away
        self._at(now + away, self._up, worker)

    def _up(self, now: float, worker: _Worker) -> None:
        worker.is_warm, worker.free_since = False, now
        self.idle.insert(0, worker)
        self._expect_down(now, worker)

    def _is_given_back(self, worker: _Worker, now: float) -> bool:
        keep = self.plan.keep_warm
        return keep is not None and (not worker.is_warm or now - worker.free_since > keep)

    def _paid_idle(self, worker: _Worker, now: float) -> float:
        if self.plan.keep_warm is None:
            return now - worker.free_since
        return min(now - worker.free_since, self.plan.keep_warm) if worker.is_warm else 0.0
