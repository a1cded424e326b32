"""Replicas of the model on Ray Serve, which starts them again where they die or hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_diffusion.cluster.fleet.connection import INSTALL_RAY, connect
from dora_diffusion.cluster.serving.batcher import WorkerLostError
from dora_diffusion.cluster.serving.catalogue import Catalogue
from dora_diffusion.cluster.serving.engine import BatchItem, Engine, Reply
from dora_diffusion.cluster.serving.settings import ServingSettings
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.config.wording import counted
from dora_diffusion.system import is_address, is_loopback, is_private

TOKEN_VARIABLE = "DORA_DIFFUSION_TOKEN"
SHORTEST_TOKEN = 16
_REPLICA = "replica"
# A replica that has not answered three checks in a row is killed, with its batch.
_CHECKS: dict[str, Any] = {
    "health_check_period_s": 5,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 5,
}
_ENVIRONMENT = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
_OBJECT_STORE = 256 * 1024**2


@dataclass(frozen=True)
class Deployment:
    """A base model and how it is served.

    Attributes:
        base: The base model, as replicas find it.
        settings: The settings of ``serve``.
        token: The token that requests must have; None on this machine alone.

    Raises:
        ConfigError: If others than this machine's users could ask without a token, or a value
            cannot be.
    """

    base: BaseModel
    settings: ServingSettings
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        host, address, gpus = self.settings.host, self.settings.address, self.settings.replica_gpus
        require(is_address(host), f"host is {host!r}; it must be an address or a name", "host")
        require(
            gpus is None or gpus <= 1 or gpus.is_integer(),
            f"replica_gpus is {gpus}; it must be a share of one, such as 0.5, or a whole number",
            "replica_gpus",
        )
        require(
            "://" not in address,
            f"address is {address}; run serve on a node of the cluster, with --address auto",
            "address",
        )
        require(
            self.token is not None or is_loopback(host),
            f"host {host} lets others ask this server; give --token_file, or set {TOKEN_VARIABLE}",
            "host",
        )

    @property
    def url(self) -> str:
        host, port = self.settings.host, self.settings.port
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def name(self) -> str:
        """Name of the application on a cluster with several: a port is one server's alone."""
        return f"dora-diffusion-{platform.node()}-{self.settings.port}"


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of the environment.

    Raises:
        ConfigError: If it is short enough to be guessed.
    """
    text = file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN_VARIABLE, "")
    token, where = text.strip(), file or TOKEN_VARIABLE
    if file and not is_private(file):
        warnings.warn(f"others can read {file}; run 'chmod 600 {file}'", stacklevel=2)
    require(not file or bool(token), f"{file} is empty; write a token into it", "token_file")
    require(
        not token or (len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()),
        f"the token of {where} must have at least {SHORTEST_TOKEN} ASCII characters in one line",
        "token_file",
    )
    return token or None


class Replica:
    """A process with one base model."""

    def __init__(self, deployment: Deployment) -> None:
        _close_door()
        settings = deployment.settings
        self._engine = Engine.load(deployment.base, settings.adapter_bytes, settings.model_options)
        self._timeout = settings.timeout

    async def answer(self, asked: Sequence[BatchItem]) -> Reply:
        given_up = threading.Event()
        try:
            # In a thread, so that the replica answers Ray's health checks meanwhile.
            return await asyncio.to_thread(self._engine.answer, asked, given_up.is_set)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def check_health(self) -> None:
        """Raise if a batch takes longer than anybody waits for it; Ray Serve calls it."""
        since = self._engine.busy_since
        if since is not None and time.monotonic() - since > self._timeout:
            raise RuntimeError("a batch does not end")


def _close_door() -> None:
    """Keep a replica from the port that Ray Serve would open after this.

    The port listens on all addresses without a token and unpickles its input: a client that
    reaches it runs code as this user. Calls between Ray's processes do not need it.
    """
    with contextlib.suppress(ImportError):
        from grpc.aio import _server

        _server.Server.add_insecure_port = lambda self, address: 0


class Replicas:
    """The replicas of an application."""

    def __init__(self, handle: Any, application: str) -> None:
        self._handle, self._application = handle, application

    async def answer(self, batch: Sequence[BatchItem]) -> Reply:
        """Send a batch to a free replica, and return its answer.

        Raises:
            WorkerLostError: If it died, or was killed since it hung.
        """
        from ray.exceptions import RayActorError

        response = self._handle.answer.remote(batch)
        try:
            reply: Reply = await response
        except RayActorError as error:
            raise WorkerLostError("a replica died") from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        return reply

    async def count(self) -> int:
        """Return the number of healthy replicas."""
        from ray import serve
        from ray.serve.schema import ReplicaState

        applications = (await asyncio.to_thread(serve.status)).applications
        if self._application not in applications:
            return 0
        states = applications[self._application].deployments[_REPLICA].replica_states
        return states.get(ReplicaState.RUNNING, 0)


@contextlib.contextmanager
def deployed(deployment: Deployment) -> Iterator[Replicas]:
    """Replicas that have loaded their model, inside the block.

    Raises:
        ConfigError: If Ray is not installed, there is no cluster, or the model cannot be loaded.
    """
    from dora_diffusion.models.locate import looks_local

    # Sooner than Ray, which starts the replicas three times.
    base, address = str(deployment.base.path), deployment.settings.address
    is_path = looks_local(base) and ":" not in base and address == "local"
    require(
        not is_path or Path(base).expanduser().exists(),
        f"base {base} does not exist; name a folder, a file, a hub id or embedded:NAME",
        "base",
    )
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    try:
        from ray import serve as ray_serve
    except ImportError:
        raise ConfigError(
            f"serving needs Ray Serve, which is not installed; run {INSTALL_RAY}"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    name = deployment.name
    leave = connect(address, _OBJECT_STORE)
    try:
        try:
            ray_serve.start(proxy_location="Disabled")
            handle = ray_serve.run(_application(deployment), name=name, route_prefix=None)
        except RuntimeError as error:
            reason = _reason(ray_serve.status(), name) or _last_line(str(error))
            raise ConfigError(f"the service could not be started: {reason}") from error
        yield Replicas(handle, name)
    finally:
        if address != "local":  # Else all of it ends.
            with contextlib.suppress(Exception):
                ray_serve.delete(name)
        leave()


def _application(deployment: Deployment) -> Any:
    """The replicas, with the share of a node that each takes."""
    import ray
    from ray import serve

    settings, resources = deployment.settings, ray.cluster_resources()
    count, gpus = settings.replicas, settings.replica_gpus
    if gpus is None:
        gpus = min(1.0, resources.get("GPU", 0) / count)
    # Threads are as many, whole ones at least.
    share = resources.get("CPU", 1) / count
    cpus = 1.0 if gpus or settings.address != "local" else share // 1 or share
    replica: Any = serve.deployment(
        Replica,
        name=_REPLICA,
        num_replicas=count,
        # The server batches: a replica has one batch at a time.
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **_CHECKS,
    )
    return replica.bind(deployment)


def serve(deployment: Deployment, catalogue: Catalogue) -> None:
    """Serve until a signal, with a line on stdout for each request.

    Raises:
        ConfigError: As `deployed` does, and if another program has the port.
    """
    from dora_diffusion.cluster.serving.api import Service, make_app
    from dora_diffusion.cluster.serving.server import listen, run

    logger, handler = (
        logging.getLogger("dora_diffusion.cluster.serving"),
        logging.StreamHandler(sys.stdout),
    )
    logger.setLevel(logging.INFO)

    def announce() -> None:
        count = counted(len(catalogue.scan()), "adapter")
        print(f"{deployment.url} is ready: {count}; Ctrl-C ends it", flush=True)

    settings = deployment.settings
    with listen(settings.host, settings.port) as listening:
        print(f"loading {deployment.base.path} ...", flush=True)
        with deployed(deployment) as replicas:
            logger.addHandler(handler)
            service = Service(
                catalogue,
                replicas.answer,
                replicas.count,
                settings.timeout,
                batch_size=settings.batch_size,
                window=settings.window,
                capacity=settings.queue,
                workers=settings.replicas,
            )
            asyncio.run(run(make_app(service, deployment.token), service, listening, announce))
            logger.removeHandler(handler)
            print("ended", flush=True)


def _reason(status: Any, application: str) -> str:
    """Return why an application's replicas did not start: their error, without its class."""
    found = getattr(status.applications.get(application), "deployments", {})
    message = found[_REPLICA].message if _REPLICA in found else ""
    return re.sub(r"^[\w.]+: ", "", _last_line(message))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
