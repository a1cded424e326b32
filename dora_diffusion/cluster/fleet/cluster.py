"""Workers that are actors of Ray: on this machine, or on a cluster.

Ray Core's actors, and neither Ray Train nor Ray Data. Ray Train is for one training over several
processes, restarted as a whole; trainings here are many, small and independent, and resume by
themselves. Ray Data streams rows through a function; a training takes minutes, has progress, and is
to be retried where its checkpoint is. What an actor gives is all that is wanted: a process that
keeps the base model, with its share of a node, whose end is told.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_diffusion.cluster.fleet.connection import connect, ray_library
from dora_diffusion.cluster.fleet.queue import Place, Task, TaskReport, Work, Worker, Workers
from dora_diffusion.config import ConfigError
from dora_diffusion.config.wording import counted

_WAIT_SECONDS = 1.0
# Workers in a row that may fail to start.
_MOST_FAILED = 3


@dataclass(frozen=True)
class Share:
    """Share of a node that a worker takes.

    Attributes:
        num_cpus: Processors.
        num_gpus: GPUs, or a share of one; None: one where the cluster has GPUs.
        workers: Most workers at once; None: as many as fit.
    """

    num_cpus: float = 1.0
    num_gpus: float | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus", "workers"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name == "workers" and value < 1)):
                raise ConfigError(f"{name} is {value:g}; it must be positive", name)


class _Actor:
    """A worker in a process of Ray's. What it does runs beside its answers."""

    def __init__(self, work: Work) -> None:
        raylet = os.getppid()

        def leave_with_node() -> None:
            """End this process once the raylet is gone that started it: Ray gives its task away."""
            if os.getppid() != raylet:
                os._exit(1)

        self._work, self._worker = work, Worker(leave_with_node)

    def ready(self) -> tuple[str, str]:
        """Import what trainings need; returns where this is."""
        import dora_diffusion.training.loop  # noqa: F401

        node = platform.node() or "a node"
        return f"{node}:{os.getpid()}", node

    def do(self, payload: Any, waited: float) -> tuple[Any, Exception | None]:
        """Run a task; returns what the work returned or raised."""
        self._worker.waited, self._worker.told = waited, {}
        try:
            return self._work(payload, self._worker), None
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return None, _portable(error)

    def told(self) -> dict[str, Any]:
        return self._worker.told


def _portable(error: Exception) -> Exception:
    """An error that arrives in another process as it is, or its text."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Seat:
    """An actor, and what it is at: ``call`` is its start, and then its task."""

    actor: Any
    created: float
    call: Any
    place: Place | None = None
    waited: float = 0.0
    task: Task | None = None
    asked: Any = None
    told: dict[str, Any] = field(default_factory=dict)


class RayWorkers(Workers):
    """Actors over a cluster, as many as fit or are allowed, each with its share of a node.

    Args:
        work: What is done with each task's payload.
        address: See `connect`.
        share: What each takes.
    """

    def __init__(self, work: Work, address: str, share: Share) -> None:
        super().__init__(work)
        self._address, self._share = address, share
        self._seats: list[_Seat] = []
        self._failed = 0

    def __enter__(self) -> RayWorkers:
        self._ray = ray_library()
        self._leave = connect(self._address)
        try:
            self._demand = self._wanted()
            if self._share.workers is None and not self._fitting():
                demand = ", ".join(f"{amount:g} {kind}" for kind, amount in self._demand.items())
                raise ConfigError(
                    f"no node of the cluster has {demand} for a worker; lower --num_gpus or "
                    "--num_cpus, or give --workers to wait for nodes"
                )
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for seat in self._seats:
            self._dismiss(seat)
        self._leave()

    def _wanted(self) -> dict[str, float]:
        gpus = self._share.num_gpus
        if gpus is None:
            gpus = float(any(node.get("GPU", 0) for node in self._nodes()))
        wanted = {"CPU": self._share.num_cpus, "GPU": gpus}
        return {kind: amount for kind, amount in wanted.items() if amount}

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fitting(self) -> int:
        """Return the number of workers that the present nodes have room for."""
        return sum(
            min(
                (int(node.get(kind, 0) / amount + 1e-6) for kind, amount in self._demand.items()),
                default=1,
            )
            for node in self._nodes()
        )

    def idle(self, waiting: int) -> int:
        busy = sum(seat.task is not None for seat in self._seats)
        limit = self._fitting() if self._share.workers is None else self._share.workers
        if not self._seats:
            self._warn_of_shortage()
        for _ in range(len(self._seats), min(limit, busy + waiting)):
            self._seats.append(self._hire())
        return len(self._idle_seats())

    def _warn_of_shortage(self) -> None:
        """Warn that the first worker has to wait for what else runs on the cluster."""
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        for kind, amount in self._demand.items():
            if free.get(kind, 0) < amount:
                warnings.warn(
                    f"waiting for room on the cluster: a worker takes {amount:g} {kind}, and "
                    f"{free.get(kind, 0):g} of {total.get(kind, 0):g} are free; end what else runs "
                    "there, such as serve (ray status shows how much is in use), or add a node",
                    stacklevel=4,
                )

    def _idle_seats(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.call is None]

    def _hire(self) -> _Seat:
        actor_class: Any = self._ray.remote(_Actor)
        actor = actor_class.options(
            num_cpus=self._demand.get("CPU", 0),
            num_gpus=self._demand.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,  # Answers while it works.
            scheduling_strategy="SPREAD",
        ).remote(self._work)
        return _Seat(actor, time.monotonic(), actor.ready.remote())

    def _dismiss(self, seat: _Seat) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(seat.actor)

    def start(self, task: Task) -> Place:
        seat = self._idle_seats()[0]
        assert seat.place is not None
        seat.task, seat.told = task, {}
        seat.call = seat.actor.do.remote(task.payload, seat.waited)
        seat.waited = 0.0
        return seat.place

    def wait(self) -> list[TaskReport]:
        calls = [seat.call for seat in self._seats if seat.call is not None]
        if not calls:
            time.sleep(_WAIT_SECONDS)  # No node is left that one would fit on; some may come.
            return []
        self._ray.wait(calls, num_returns=1, timeout=_WAIT_SECONDS)
        reports = [report for seat in list(self._seats) for report in self._settle(seat)]
        self._ask_all()
        return reports

    def _is_there(self, reference: Any) -> bool:
        return reference is not None and bool(self._ray.wait([reference], timeout=0)[0])

    def _settle(self, seat: _Seat) -> list[TaskReport]:
        """Return the outcome of an actor's task; one that starts has none.

        Raises:
            ConfigError: If none starts at all.
        """
        if not self._is_there(seat.call):
            return []
        try:
            answer = self._ray.get(seat.call)
        except Exception as error:  # The actor is gone, alone or with its node.
            self._seats.remove(seat)
            self._dismiss(seat)  # It may be there, and out of reach.
            if seat.task is not None and seat.place is not None:
                return [TaskReport(seat.task, seat.place, lost=_reason(error))]
            self._failed += 1
            if self._failed < _MOST_FAILED:
                return []
            raise ConfigError(
                f"{counted(self._failed, 'worker')} in a row could not start: {_reason(error)}; is "
                "dora-diffusion of this version installed on every node?"
            ) from error
        task, seat.call, seat.task = seat.task, None, None
        if task is None or seat.place is None:
            seat.place, self._failed = Place(*answer), 0
            seat.waited = time.monotonic() - seat.created
            return []
        return [TaskReport(task, seat.place, *answer)]

    def _ask_all(self) -> None:
        """Fetch what busy actors have told, and ask them again; nothing is waited for."""
        for seat in self._seats:
            if seat.asked is not None and self._is_there(seat.asked):
                with contextlib.suppress(Exception):  # Its task says that it is gone.
                    seat.told = self._ray.get(seat.asked)
                seat.asked = None
            if seat.asked is None and seat.task is not None:
                seat.asked = seat.actor.told.remote()

    def progress(self) -> dict[str, Any]:
        return {seat.task.name: seat.told for seat in self._seats if seat.task is not None}


def _reason(error: Exception) -> str:
    """Return why an actor is gone, in a line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "node" in text and ("died" in text or "dead" in text) and "worker process" not in text:
        return "its node is gone"
    if "OutOfMemory" in kind or "OOM" in text.partition("Some common causes")[0]:
        return "its node ran out of memory"
    if kind in ("ActorDiedError", "RayActorError", "WorkerCrashedError"):
        return "its process is gone (killed, or out of memory)"
    return f"{kind}: {text[:200]}"
