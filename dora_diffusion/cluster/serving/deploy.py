"""Replicas of the model on Ray Serve, which restarts them when they die or hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cluster.fleet.connection import INSTALL_RAY, connect
from dora_diffusion.cluster.serving.batcher import WorkerLostError
from dora_diffusion.cluster.serving.catalogue import Catalogue
from dora_diffusion.cluster.serving.engine import BatchItem, Engine, Reply
from dora_diffusion.cluster.serving.settings import ServingSettings
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.system import is_loopback, is_private

if TYPE_CHECKING:
    from dora_diffusion.formats.checkpoint.models import StoredModel

TOKEN_VARIABLE = "DORA_DIFFUSION_TOKEN"
SHORTEST_TOKEN = 16
_REPLICA = "replica"
# A replica that misses three checks in a row is killed with its batch.
_CHECKS: dict[str, Any] = {
    "health_check_period_s": 5,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 5,
}
_ENVIRONMENT = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
_OBJECT_STORE = 256 * 1024**2


def read_token(settings: ServingSettings) -> str | None:
    """Read the token that requests must send, from a file or else from the environment.

    Returns:
        The token; None if there is none, and only this machine can send requests.

    Raises:
        ConfigError: If the token is too short or malformed, or other machines could send requests
            without a token.
    """
    file, host = settings.token_file, settings.host
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
    require(
        bool(token) or is_loopback(host),
        f"host {host} lets others ask this server; give --token_file, or set {TOKEN_VARIABLE}",
        "host",
    )
    return token or None


class Replica:
    """Ray Serve replica: a process with one base model."""

    def __init__(self, settings: ServingSettings) -> None:
        _close_door()
        base, options = settings.base_model, settings.model_options
        self._engine = Engine.load(base, settings.adapter_bytes, options)
        self._timeout = settings.timeout

    async def answer(self, batch: Sequence[BatchItem]) -> Reply:
        given_up = threading.Event()
        try:
            # In a thread, so that the replica can answer Ray's health checks meanwhile.
            return await asyncio.to_thread(self._engine.answer, batch, given_up.is_set)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def check_health(self) -> None:
        """Raise an error if a batch exceeds the timeout of requests; called by Ray Serve."""
        since = self._engine.busy_since
        if since is not None and time.monotonic() - since > self._timeout:
            raise RuntimeError("a batch does not end")


def _close_door() -> None:
    """Prevent Ray Serve from opening a gRPC port in this process.

    The port would listen on all addresses without a token and unpickle its input, so that any
    client could run code as this user. Calls between Ray's processes do not need it.
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
            WorkerLostError: If the replica died, or hung and was killed.
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
def deployed(settings: ServingSettings) -> Iterator[Replicas]:
    """Start replicas, and yield them once they have loaded their model.

    Raises:
        ConfigError: If Ray is not installed, the cluster cannot be reached, or the model cannot be
            loaded.
    """
    from dora_diffusion.models.locate import looks_local

    # Check the path first: Ray would start the replicas three times.
    base, address = settings.base, settings.address
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
    name = settings.application
    leave = connect(address, _OBJECT_STORE)
    try:
        try:
            ray_serve.start(proxy_location="Disabled")
            handle = ray_serve.run(_application(settings), name=name, route_prefix=None)
        except RuntimeError as error:
            reason = _reason(ray_serve.status(), name) or _last_line(str(error))
            raise ConfigError(f"the service could not be started: {reason}") from error
        yield Replicas(handle, name)
    finally:
        if address != "local":  # A local cluster ends with this process.
            with contextlib.suppress(Exception):
                ray_serve.delete(name)
        leave()


def _application(settings: ServingSettings) -> Any:
    """Return the application, with the resources of each replica."""
    import ray
    from ray import serve

    resources = ray.cluster_resources()
    count, gpus = settings.replicas, settings.replica_gpus
    if gpus is None:
        gpus = min(1.0, resources.get("GPU", 0) / count)
    # Ray starts as many threads: a whole number, unless there is less than one.
    share = resources.get("CPU", 1) / count
    cpus = 1.0 if gpus or settings.address != "local" else share // 1 or share
    replica: Any = serve.deployment(
        Replica,
        name=_REPLICA,
        num_replicas=count,
        # The server forms batches; a replica has one at a time.
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **_CHECKS,
    )
    return replica.bind(settings)


def serve(settings: ServingSettings, token: str | None, catalogue: Catalogue) -> None:
    """Serve until a signal, with a line on stdout for each request.

    Raises:
        ConfigError: From `deployed`, or if the port is in use.
    """
    from dora_diffusion.cluster.serving.api import Service, make_app
    from dora_diffusion.cluster.serving.server import listen, run

    logger = logging.getLogger("dora_diffusion.cluster.serving")
    handler = logging.StreamHandler(sys.stdout)
    logger.setLevel(logging.INFO)

    with listen(settings.host, settings.port) as listening:
        print(f"loading {settings.base} ...", flush=True)
        with deployed(settings) as replicas, _weights_here(settings.base_model) as base:
            logger.addHandler(handler)
            service = Service(
                catalogue,
                replicas.answer,
                replicas.count,
                settings.timeout,
                base,
                batch_size=settings.batch_size,
                window=settings.window,
                capacity=settings.queue,
                workers=settings.replicas,
            )

            def announce() -> None:
                count = service.counted_adapters()
                print(f"{settings.url} is ready: {count}; Ctrl-C ends it", flush=True)

            asyncio.run(run(make_app(service, token), service, listening, announce))
            logger.removeHandler(handler)
            print("ended", flush=True)


@contextlib.contextmanager
def _weights_here(base: BaseModel) -> Iterator[StoredModel | None]:
    """Open the base's files, to check adapters; None if only other machines have them."""
    from dora_diffusion.export.files import open_model
    from dora_diffusion.models.locate import resolve_folder

    with contextlib.ExitStack() as stack:
        model = None
        with contextlib.suppress(ValueError, OSError):
            is_file = Path(base.path).expanduser().is_file()
            path = base.path if is_file else resolve_folder(base, local_only=True)
            model = stack.enter_context(open_model(BaseModel(str(path), base.variant)))
        yield model


def _reason(status: Any, application: str) -> str:
    """Return the error of replicas that did not start, without its class."""
    deployments = getattr(status.applications.get(application), "deployments", {})
    message = deployments[_REPLICA].message if _REPLICA in deployments else ""
    return re.sub(r"^[\w.]+: ", "", _last_line(message))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
