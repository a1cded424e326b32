"""The service on Ray Serve: an ingress that queues and batches, and replicas of the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.fleet.connection import INSTALL_RAY, connect
from dora_diffusion.serving.engine import BatchItem, Engine, Reply
from dora_diffusion.system import is_address, is_loopback

TOKEN_VARIABLE = "DORA_DIFFUSION_TOKEN"
SHORTEST_TOKEN = 16
_NAME, _REPLICA = "dora-diffusion", "replica"
# A proxy of Ray Serve needs longer than its 5 s on a machine that is busy, and would be killed
# again and again. Nothing is sent to Ray's makers.
_ENVIRONMENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECT_STORE = 256 * 1024**2


@dataclass(frozen=True)
class Deployment:
    """What is served, and how.

    Attributes:
        base: The base model.
        adapters: As `Catalogue` takes them; replicas see the same paths.
        options: Of `Engine.load`.
        adapter_memory: Bytes of each replica that adapters may take.
        host, port: Where HTTP is listened to.
        token: What requests must have; None on this machine alone.
        address: ``"local"`` starts Ray; else that of a cluster that runs.
        replicas: Processes with a model each.
        replica_gpus: GPUs of each, or shares of one.
        batch_size, window, capacity: Of the `Batcher`.
        timeout: Seconds after which a request is given up.

    Raises:
        ConfigError: If others than this machine's users could ask without a token, or a value
            cannot be.
    """

    base: str
    adapters: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    adapter_memory: int = 2 * 10**9
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    address: str = "local"
    replicas: int = 1
    replica_gpus: float | None = None
    batch_size: int = 8
    window: float = 0.05
    capacity: int = 64
    timeout: float = 120.0

    def __post_init__(self) -> None:
        require(is_address(self.host), f"host is {self.host!r}; it must be an address or a name")
        require(1 <= self.port <= 65535, f"port is {self.port}; it must be 1 to 65535")
        for name in ("replicas", "batch_size", "capacity", "adapter_memory"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1", name)
        require(0 <= self.window <= 10, f"window is {self.window}; it must be 0 to 10 seconds")
        require(self.timeout > 0, f"timeout is {self.timeout}; it must be more than 0 seconds")
        require(
            self.token is not None or is_loopback(self.host),
            f"host {self.host} lets others ask this server; give --token_file, or set "
            f"{TOKEN_VARIABLE}",
        )

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of the environment.

    Raises:
        ConfigError: If it is short enough to be guessed.
    """
    text = file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN_VARIABLE, "")
    token, where = text.strip(), file or TOKEN_VARIABLE
    require(not file or bool(token), f"{file} is empty; write a token into it")
    require(
        not token or (len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()),
        f"the token of {where} must have at least {SHORTEST_TOKEN} ASCII characters in one line",
    )
    return token or None


class Replica:
    """A process with one base model."""

    def __init__(self, deployment: Deployment) -> None:
        self._engine = Engine.load(
            deployment.base, deployment.adapter_memory, dict(deployment.options)
        )

    async def answer(self, asked: Sequence[BatchItem]) -> Reply:
        # In a thread, so that Ray is told meanwhile that the replica lives.
        return await asyncio.to_thread(self._engine.answer, asked)


def _ingress(deployment: Deployment) -> Any:
    """What builds the API in its process."""

    def build() -> Any:
        from ray import serve
        from ray.exceptions import RayActorError

        from dora_diffusion.serving.api import Service, make_app
        from dora_diffusion.serving.batcher import WorkerLostError
        from dora_diffusion.serving.catalogue import Catalogue

        handle = serve.get_deployment_handle(_REPLICA, app_name=_NAME)

        async def run(batch: Sequence[BatchItem]) -> Reply:
            try:
                reply: Reply = await handle.answer.remote(batch)
            except RayActorError as error:
                raise WorkerLostError("a replica died") from error
            return reply

        service = Service(
            Catalogue(deployment.adapters),
            run,
            deployment.timeout,
            batch_size=deployment.batch_size,
            window=deployment.window,
            capacity=deployment.capacity,
            workers=deployment.replicas,
        )
        return make_app(service, deployment.token)

    return build


@contextlib.contextmanager
def deployed(deployment: Deployment) -> Iterator[None]:
    """Serve inside the block, in which every replica has loaded its model.

    Raises:
        ConfigError: If Ray is not installed, there is no cluster, or the model cannot be loaded.
    """
    from dora_diffusion.models.locate import looks_local

    # Ray tells of a replica that did not start, and not why.
    base = deployment.base
    is_path = looks_local(base) and ":" not in base and deployment.address == "local"
    require(
        not is_path or Path(base).expanduser().exists(),
        f"base {base} does not exist; name a folder, a file, a hub id or embedded:NAME",
    )
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    try:
        from ray import serve
    except ImportError:
        raise ConfigError(
            f"serving needs Ray Serve, which is not installed; run {INSTALL_RAY}"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    leave = connect(deployment.address, _OBJECT_STORE)
    try:
        try:
            serve.start(http_options={"host": deployment.host, "port": deployment.port})
            serve.run(_application(deployment), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise ConfigError(f"the service could not be started: {_last_line(error)}") from error
        yield
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown() if deployment.address == "local" else serve.delete(_NAME)
        leave()


def _application(deployment: Deployment) -> Any:
    """The ingress, and the replicas that it asks."""
    import ray
    from ray import serve

    resources, count = ray.cluster_resources(), deployment.replicas
    gpus = deployment.replica_gpus
    if gpus is None:
        gpus = min(1.0, resources.get("GPU", 0) / count)
    # Threads are as many, whole ones at least.
    share = resources.get("CPU", 1) / count
    cpus = 1.0 if gpus or deployment.address != "local" else share // 1 or share
    replica: Any = serve.deployment(
        Replica,
        name=_REPLICA,
        num_replicas=count,
        # The ingress batches: a replica has one batch at a time.
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_timeout_s=120,
    )
    ingress: Any = serve.deployment(
        serve.ingress(_ingress(deployment))(),
        name="ingress",
        # More than it accepts: what is beyond is for it to refuse.
        max_ongoing_requests=1000 + deployment.capacity,
        ray_actor_options={"num_cpus": 0},
        health_check_timeout_s=120,
    )
    return ingress.bind(replica.bind(deployment))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
