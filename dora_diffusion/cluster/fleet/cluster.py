"""Workers that are Ray actors, on this machine or on a cluster.

Ray Core's actors fit better than Ray Train or Ray Data. Ray Train runs one training in several
processes and restarts it as a whole, but a fleet has many small, independent trainings, which
resume by themselves. Ray Data streams rows through a function, but a training takes minutes,
reports progress, and is retried from its checkpoint. An actor is a process that keeps the base
model in memory, has a share of a node, and whose end is detected.
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
from dataclasses import dataclass
from typing import Any

from dora_diffusion.cluster.fleet.connection import Share, connect, ray_library
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
from dora_diffusion.training.events import StepDone

_WAIT_SECONDS = 1.0
# Most consecutive workers that may fail to start.
_MOST_FAILED = 3


class _Actor:
    """Worker in a Ray process. It can return the last step while a task runs."""

    def __init__(self, work: Work) -> None:
        raylet = os.getppid()

        def leave_with_node() -> None:
            """End this process if its raylet has ended, because Ray reassigns its task."""
            if os.getppid() != raylet:
                os._exit(1)

        self._work, self._worker = work, Worker(leave_with_node)

    def ready(self) -> tuple[str, str]:
        """Import the training code. Returns the names of worker and node."""
        import dora_diffusion.training.recipe  # noqa: F401

        node = platform.node() or "a node"
        return f"{node}:{os.getpid()}", node

    def do(self, payload: Any, waited: float) -> tuple[Any, Exception | None]:
        """Run a task. Returns its result and its error."""
        self._worker.waited, self._worker.step = waited, None
        try:
            return self._work(payload, self._worker), None
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return None, _portable(error)

    def step(self) -> StepDone | None:
        return self._worker.step


def _portable(error: Exception) -> Exception:
    """Return an error if it can be pickled, else a `RuntimeError` with its text."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _ActorSlot:
    """An actor and its state; ``call`` is the pending start, then the pending task."""

    actor: Any
    created: float
    call: Any
    location: WorkerLocation | None = None
    waited: float = 0.0
    task: Task | None = None
    step_call: Any = None
    step: StepDone | None = None


class RayWorkers(Workers):
    """Ray actors as workers, as many as fit or are allowed, each with its share of a node.

    Args:
        work: Function of a task's payload.
        address: Address of the cluster, see `connect`.
        share: Share of a node for each worker.
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
            self._demand = self._required()
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

    def _required(self) -> dict[str, float]:
        gpus = self._share.num_gpus
        if gpus is None:
            gpus = float(any(node.get("GPU", 0) for node in self._nodes()))
        resources = {"CPU": self._share.num_cpus, "GPU": gpus}
        return {kind: amount for kind, amount in resources.items() if amount}

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fitting(self) -> int:
        """Return the number of workers that fit on the current nodes."""
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
        """Warn if the first worker has to wait for other programs on the cluster."""
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        for kind, amount in self._demand.items():
            if free.get(kind, 0) < amount:
                warnings.warn(
                    f"waiting for room on the cluster: a worker takes {amount:g} {kind}, and "
                    f"{free.get(kind, 0):g} of {total.get(kind, 0):g} are free; end other programs "
                    "there, such as serve (ray status shows the usage), or add a node",
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
            max_concurrency=2,  # It returns the last step during a task.
            scheduling_strategy="SPREAD",
        ).remote(self._work)
        return _ActorSlot(actor, time.monotonic(), actor.ready.remote())

    def _stop_actor(self, slot: _ActorSlot) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(slot.actor)

    def start(self, task: Task) -> WorkerLocation:
        slot = self._idle_slots()[0]
        assert slot.location is not None
        slot.task, slot.step = task, None
        slot.call = slot.actor.do.remote(task.payload, slot.waited)
        slot.waited = 0.0
        return slot.location

    def wait(self) -> list[TaskReport]:
        calls = [slot.call for slot in self._slots if slot.call is not None]
        if not calls:
            time.sleep(_WAIT_SECONDS)  # No node has room for a worker now; one may join.
            return []
        self._ray.wait(calls, num_returns=1, timeout=_WAIT_SECONDS)
        reports = [report for slot in list(self._slots) for report in self._settle(slot)]
        self._fetch_steps()
        return reports

    def _is_there(self, reference: Any) -> bool:
        return reference is not None and bool(self._ray.wait([reference], timeout=0)[0])

    def _settle(self, slot: _ActorSlot) -> list[TaskReport]:
        """Return the report of an actor's task if it has ended.

        Raises:
            ConfigError: If several actors in a row failed to start.
        """
        if not self._is_there(slot.call):
            return []
        try:
            answer = self._ray.get(slot.call)
        except Exception as error:  # The actor or its node has died.
            self._slots.remove(slot)
            self._stop_actor(slot)  # It may be alive but unreachable.
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

    def _fetch_steps(self) -> None:
        """Collect the last steps of busy actors, and request them again, without waiting."""
        for slot in self._slots:
            if slot.step_call is not None and self._is_there(slot.step_call):
                with contextlib.suppress(Exception):  # A dead actor is handled with its task.
                    slot.step = self._ray.get(slot.step_call)
                slot.step_call = None
            if slot.step_call is None and slot.task is not None:
                slot.step_call = slot.actor.step.remote()

    def progress(self) -> dict[str, StepDone | None]:
        return {slot.task.name: slot.step for slot in self._slots if slot.task is not None}


def _reason(error: Exception) -> str:
    """Return the reason for the loss of an actor, in one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "node" in text and ("died" in text or "dead" in text) and "worker process" not in text:
        return "its node is gone"
    if "OutOfMemory" in kind or "OOM" in text.partition("Some common causes")[0]:
        return "its node ran out of memory"
    if kind in ("ActorDiedError", "RayActorError", "WorkerCrashedError"):
        return "its process is gone (killed, or out of memory)"
    return f"{kind}: {text[:200]}"
