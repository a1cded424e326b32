"""A bounded queue of requests that are answered in batches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")

# Most attempts at a request whose worker dies; the request itself may be the cause.
MOST_ATTEMPTS = 3


class QueueFullError(Exception):
    """Error of a full queue.

    Attributes:
        retry_after: Estimated time in whole seconds until the queue has room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class WorkerLostError(Exception):
    """Error for a worker that died; its requests can be retried on another worker."""


@dataclass(eq=False)
class _Waiting(Generic[Request, Answer]):
    request: Request
    key: Hashable
    since: float
    answer: asyncio.Future[Answer]
    attempts: int = 0
    batch: asyncio.Task[None] | None = None


@dataclass
class Batcher(Generic[Request, Answer]):
    """Groups requests into batches, in order of arrival, and runs them on workers.

    The requests of a batch have the same key. A batch starts once a worker is free and the batch is
    full or its first request has waited for the window; while all workers are busy, batches grow.
    The batch of the oldest request comes first. A batch is cancelled, and its worker freed, once
    all its requests are cancelled. All methods must be called from one event loop.

    Attributes:
        run: Returns the answers to a batch; an exception is the answer to a failed request. It
            raises `WorkerLostError` if its worker died. The requests are then retried, in the last
            attempt one by one, because one of them may have killed the worker.
        batch_size: Most requests of a batch.
        window: Seconds that a request waits for others.
        capacity: Most waiting requests.
        workers: Number of concurrent batches.
    """

    run: Callable[[Sequence[Request]], Awaitable[Sequence[Answer | Exception]]]
    batch_size: int = 8
    window: float = 0.05
    capacity: int = 64
    workers: int = 1
    _queue: list[_Waiting[Request, Answer]] = field(default_factory=list)
    _running: dict[asyncio.Task[None], list[_Waiting[Request, Answer]]] = field(
        default_factory=dict
    )
    _timer: asyncio.TimerHandle | None = None
    _seconds: float = 1.0

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return len(self._queue)

    async def submit(self, request: Request, key: Hashable) -> Answer:
        """Queue a request and return its answer. Cancellation removes it from the queue.

        Args:
            request: The request, passed to `run`.
            key: Requests with the same key may share a batch.

        Raises:
            QueueFullError: If too many requests wait.
            WorkerLostError: If all attempts lost their worker.
            Exception: The answer from `run` to a failed request.
        """
        if len(self._queue) >= self.capacity:
            raise QueueFullError(self.retry_after)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(request, key, asyncio.get_running_loop().time(), answer)
        self._queue.append(waiting)
        self._dispatch()
        try:
            return await answer
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
            if (batch := waiting.batch) is not None and all(
                mate.answer.done() for mate in self._running.get(batch, ())
            ):
                batch.cancel()

    @property
    def retry_after(self) -> int:
        """Estimated time in whole seconds until all waiting requests are answered."""
        batches = 1 + len(self._queue) // self.batch_size
        return max(1, math.ceil(batches / self.workers * self._seconds))

    def _dispatch(self) -> None:
        """Start all due batches, and schedule the next call for when another becomes due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and len(self._running) < self.workers:
            groups: dict[Hashable, list[_Waiting[Request, Answer]]] = {}
            for waiting in self._queue:
                groups.setdefault(waiting.key, []).append(waiting)
            left = {key: self._left(group) for key, group in groups.items()}
            due = next((key for key in groups if left[key] <= 0), None)
            if due is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(min(left.values()), self._dispatch)
                return
            batch = groups[due][: self.batch_size]
            self._queue = [waiting for waiting in self._queue if waiting not in batch]
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._running[task] = batch
            for waiting in batch:
                waiting.batch = task
            task.add_done_callback(self._end)

    def _left(self, group: Sequence[_Waiting[Request, Answer]]) -> float:
        """Return the seconds until a group is due."""
        if len(group) >= self.batch_size:
            return 0.0
        return group[0].since + self.window - asyncio.get_running_loop().time()

    def _end(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._dispatch()

    async def _answer(self, batch: Sequence[_Waiting[Request, Answer]]) -> None:
        begun = asyncio.get_running_loop().time()
        try:
            answers = await self.run([waiting.request for waiting in batch])
        except WorkerLostError as error:
            again = [w for w in batch if not w.answer.done() and w.attempts + 1 < MOST_ATTEMPTS]
            for waiting in again:
                waiting.attempts, waiting.batch = waiting.attempts + 1, None
                if waiting.attempts + 1 == MOST_ATTEMPTS:
                    waiting.key = waiting
            self._queue = [*again, *self._queue]
            lost = [waiting for waiting in batch if waiting not in again]
            _settle(lost, [error] * len(lost))
        except Exception as error:
            _settle(batch, [error] * len(batch))
        else:
            seconds = asyncio.get_running_loop().time() - begun
            self._seconds += 0.2 * (seconds - self._seconds)
            _settle(batch, answers)


def _settle(
    batch: Sequence[_Waiting[Request, Answer]], answers: Sequence[Answer | Exception]
) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if waiting.answer.done():
            continue  # The client has disconnected.
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
