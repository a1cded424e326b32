"""Requests that are answered together, when, and what leaves the queue."""

from __future__ import annotations

import asyncio
import random

import pytest

from dora_diffusion.cluster.serving.batcher import Batcher, QueueFullError, WorkerLostError
from tests.cluster.serving.helpers import run


class Worker:
    """Answers ``2 * request`` after so many seconds, and notes batches and when they began."""

    def __init__(self, seconds=1.0):
        self.seconds, self.batches, self.begun = seconds, [], []
        self.at_once = self.most_at_once = 0

    async def __call__(self, batch):
        self.batches.append(list(batch))
        self.begun.append(asyncio.get_running_loop().time())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        return [2 * request for request in batch]


def test_requests_of_a_key_share_a_batch_that_starts_when_full_or_due():
    worker = Worker()

    async def ask():
        batcher = Batcher(worker, batch_size=3, window=5.0, workers=9)
        asked = [batcher.submit(number, number % 2) for number in range(7)]
        return await asyncio.gather(*asked)

    assert run(ask()) == [0, 2, 4, 6, 8, 10, 12]
    # Full ones at once, what is left when its first has waited for the window.
    assert worker.batches == [[0, 2, 4], [1, 3, 5], [6]]
    assert worker.begun == pytest.approx([0, 0, 5])


def test_the_first_of_a_batch_waits_for_the_window_and_no_longer():
    worker = Worker()

    async def ask():
        batcher = Batcher(worker, window=5.0)
        first = asyncio.ensure_future(batcher.submit(0, 0))
        await asyncio.sleep(3)
        await asyncio.gather(first, batcher.submit(1, 0))

    run(ask())
    assert (worker.batches, worker.begun) == ([[0, 1]], pytest.approx([5]))


def test_while_workers_are_busy_batches_grow_and_the_oldest_come_first():
    worker = Worker(seconds=10)

    async def ask():
        batcher = Batcher(worker, batch_size=4, window=0.0, workers=2)
        first = [asyncio.ensure_future(batcher.submit(number, "a")) for number in range(2)]
        await asyncio.sleep(1)
        rest = [asyncio.ensure_future(batcher.submit(n, "ab"[n % 2])) for n in range(2, 12)]
        await asyncio.sleep(1)
        assert len(batcher) == 10
        return await asyncio.gather(*first, *rest)

    assert run(ask()) == [2 * number for number in range(12)]
    assert worker.batches == [[0], [1], [2, 4, 6, 8], [3, 5, 7, 9], [10], [11]]
    assert worker.begun == pytest.approx([0, 0, 10, 10, 20, 20])
    assert worker.most_at_once == 2


def test_beyond_its_capacity_a_queue_refuses_and_says_when_to_come_again():
    async def ask():
        batcher = Batcher(Worker(seconds=6), batch_size=2, window=0.0, capacity=4)
        asked = [asyncio.ensure_future(batcher.submit(n, 0)) for n in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refused:
            await batcher.submit(9, 0)
        # Two batches wait behind one; a batch is thought to take a second at first, then longer.
        assert refused.value.retry_after == 3
        assert await asyncio.gather(*asked) == [0, 2, 4, 6, 8]
        await asyncio.gather(*(batcher.submit(n, 0) for n in range(5)))
        assert batcher.retry_after > 3
        assert len(batcher) == 0

    run(ask())


def test_who_leaves_is_not_answered_for():
    worker = Worker()

    async def ask():
        batcher = Batcher(worker, window=0.0)
        running = asyncio.ensure_future(batcher.submit(0, 0))
        await asyncio.sleep(0)
        waiting = [asyncio.ensure_future(batcher.submit(n, 0)) for n in (1, 2, 3)]
        late = asyncio.wait_for(batcher.submit(4, 0), 0.5)
        await asyncio.sleep(0.1)
        waiting[1].cancel()
        with pytest.raises(asyncio.TimeoutError):
            await late
        running.cancel()
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, cancelled, last = run(ask())
    assert (first, last) == (2, 6)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert worker.batches == [[0], [1, 3]]


def test_one_answer_may_be_an_error_and_a_batch_may_fail():
    async def worker(batch):
        if 7 in batch:
            raise OSError("the disk is gone")
        return [ValueError(f"{n} is odd") if n % 2 else n for n in batch]

    async def ask():
        batcher = Batcher(worker, window=1.0, batch_size=2)
        asked = [batcher.submit(n, 0) for n in (1, 2, 7, 8, 4)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = run(ask())
    assert [str(each) for each in found] == [
        "1 is odd", "2", "the disk is gone", "the disk is gone", "4",
    ]  # fmt: skip


def test_what_a_worker_has_lost_comes_before_what_waits():
    seen = []

    async def worker(batch):
        seen.append(list(batch))
        await asyncio.sleep(1)
        if len(seen) == 1:
            raise WorkerLostError("gone")
        return list(batch)

    async def ask():
        batcher = Batcher(worker, window=0.0, batch_size=2)
        return await asyncio.gather(*(batcher.submit(n, 0) for n in range(4)))

    assert run(ask()) == [0, 1, 2, 3]
    assert seen == [[0], [0, 1], [2, 3]]


def test_requests_of_a_dead_worker_are_tried_again_first_and_not_forever():
    deaths, seen = random.Random(1), []

    async def worker(batch):
        seen.append(list(batch))
        await asyncio.sleep(1)
        if "killer" in batch or deaths.random() < 0.3:
            raise WorkerLostError("gone")
        return list(batch)

    async def ask():
        batcher = Batcher(worker, window=0.0, batch_size=4, workers=2)
        asked = [batcher.submit(n, 0) for n in range(40)]
        killer = batcher.submit("killer", 1)
        return await asyncio.gather(*asked, killer, return_exceptions=True)

    *answers, killed = run(ask())
    assert isinstance(killed, WorkerLostError)
    assert sum("killer" in batch for batch in seen) == 3
    # With three attempts each, hardly one is lost, and none twice answered or mixed up.
    lost = [n for n, answer in enumerate(answers) if answer != n]
    assert all(sum(n in batch for batch in seen) == 3 for n in lost)
    assert len(lost) <= 4
