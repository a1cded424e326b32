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
from dora_diffusion.cluster.fleet.queue import (
    Task,
    TaskReport,
    Work,
    Worker,
    WorkerLocation,
    Workers,
)
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
        import dora_diffusion.training.recipe  # noqa: F401

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
class _ActorSlot:
    """An actor, and what it is at: ``call`` is its start, and then its task."""

    actor: Any
    created: float
    call: Any
    location: WorkerLocation | None = None
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
        self._slots: list[_ActorSlot] = []
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
                    "--num_cpus, or give --workers to wait for nodes",
                    "workers",
                )
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for slot in self._slots:
            self._stop_actor(slot)
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
        busy = sum(slot.task is not None for slot in self._slots)
        limit = self._fitting() if self._share.workers is None else self._share.workers
        if not self._slots:
            self._warn_of_shortage()
        for _ in range(len(self._slots), min(limit, busy + waiting)):
            self._slots.append(self._start_actor())
        return len(self._idle_slots())

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

    def _idle_slots(self) -> list[_ActorSlot]:
        return [slot for slot in self._slots if slot.call is None]

    def _start_actor(self) -> _ActorSlot:
        actor_class: Any = self._ray.remote(_Actor)
        actor = actor_class.options(
            num_cpus=self._demand.get("CPU", 0),
            num_gpus=self._demand.get("GPU", 0),
            max_restarts=0,
            max_concurrency=2,  # Answers while it works.
            scheduling_strategy="SPREAD",
        ).remote(self._work)
        return _ActorSlot(actor, time.monotonic(), actor.ready.remote())

    def _stop_actor(self, slot: _ActorSlot) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(slot.actor)

    def start(self, task: Task) -> WorkerLocation:
        slot = self._idle_slots()[0]
        assert slot.location is not None
        slot.task, slot.told = task, {}
        slot.call = slot.actor.do.remote(task.payload, slot.waited)
        slot.waited = 0.0
        return slot.location

    def wait(self) -> list[TaskReport]:
        calls = [slot.call for slot in self._slots if slot.call is not None]
        if not calls:
            time.sleep(_WAIT_SECONDS)  # No node is left that one would fit on; some may come.
            return []
        self._ray.wait(calls, num_returns=1, timeout=_WAIT_SECONDS)
        reports = [report for slot in list(self._slots) for report in self._settle(slot)]
        self._ask_all()
        return reports

    def _is_there(self, reference: Any) -> bool:
        return reference is not None and bool(self._ray.wait([reference], timeout=0)[0])

    def _settle(self, slot: _ActorSlot) -> list[TaskReport]:
        """Return the outcome of an actor's task; one that starts has none.

        Raises:
            ConfigError: If none starts at all.
        """
        if not self._is_there(slot.call):
            return []
        try:
            answer = self._ray.get(slot.call)
        except Exception as error:  # The actor is gone, alone or with its node.
            self._slots.remove(slot)
            self._stop_actor(slot)  # It may be there, and out of reach.
            if slot.task is not None and slot.location is not None:
                return [TaskReport(slot.task, slot.location, lost=_reason(error))]
            self._failed += 1
            if self._failed < _MOST_FAILED:
                return []
            raise ConfigError(
                f"{counted(self._failed, 'worker')} in a row could not start: {_reason(error)}; is "
                "dora-diffusion of this version installed on every node?"
            ) from error
        task, slot.call, slot.task = slot.task, None, None
        if task is None or slot.location is None:
            slot.location, self._failed = WorkerLocation(*answer), 0
            slot.waited = time.monotonic() - slot.created
            return []
        return [TaskReport(task, slot.location, *answer)]

    def _ask_all(self) -> None:
        """Fetch what busy actors have told, and ask them again; nothing is waited for."""
        for slot in self._slots:
            if slot.asked is not None and self._is_there(slot.asked):
                with contextlib.suppress(Exception):  # Its task says that it is gone.
                    slot.told = self._ray.get(slot.asked)
                slot.asked = None
            if slot.asked is None and slot.task is not None:
                slot.asked = slot.actor.told.remote()

    def progress(self) -> dict[str, Any]:
        return {slot.task.name: slot.told for slot in self._slots if slot.task is not None}


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
