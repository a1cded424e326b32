"""The HTTP API: FastAPI over a `Service`, which does the work without HTTP."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dora_diffusion.formats.adapter.metadata import READING, ZERO_TERMINAL_SNR
from dora_diffusion.formats.checkpoint.schedule import EPSILON, PREDICTION
from dora_diffusion.serving.batcher import Batcher, QueueFullError, WorkerLostError
from dora_diffusion.serving.catalogue import Catalogue
from dora_diffusion.serving.engine import BatchItem, Reply
from dora_diffusion.serving.request import ApiAnswer, ApiRequest, Refusal

# What anybody may see: whether it runs, and how it is asked.
_OPEN = ("/health", "/ready", "/docs", "/openapi.json")
# What a file says of noise schedule and prompts, which a batch shares, and the ordinary words.
_READ = (PREDICTION, ZERO_TERMINAL_SNR, *READING)
_USUAL = ("", EPSILON, "False", "0")
_MOST_BYTES = 64 * 1024
_LOCAL_NAMES = ["localhost", "127.0.0.1"]
Run = Callable[[Sequence[BatchItem]], Awaitable[Reply]]


class Metrics:
    """What Prometheus reads at ``/metrics``."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def add(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"dora_{name}", text, labels, registry=self.registry, **options)

        seconds = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
        self.requests = add(Counter, "requests", "Requests by status.", "status")
        self.latency = add(
            Histogram, "request_seconds", "Seconds to an image, queue included.", buckets=seconds
        )
        self.sizes = add(
            Histogram, "batch_size", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.batches = add(Histogram, "batch_seconds", "Seconds of a batch.", buckets=seconds)
        self.lost = add(Counter, "workers_lost", "Batches whose replica died.")
        self.loads = add(Counter, "adapter_loads", "Adapters that were read into a replica.")
        self.waiting = add(Gauge, "queue_length", "Requests that wait for a batch.")
        self.ready = add(Gauge, "ready", "Whether a replica answers.")

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return bytes(generate_latest(self.registry))


class Service:
    """Finds the adapter of a request, and has it answered with others.

    Args:
        catalogue: The adapters.
        run: Has a batch answered by a worker that is free.
        timeout: Seconds after which a request is given up.
        queue: ``batch_size``, ``window``, ``capacity`` and ``workers`` of the `Batcher`.
    """

    def __init__(self, catalogue: Catalogue, run: Run, timeout: float, **queue: Any) -> None:
        self.catalogue, self.timeout, self.metrics = catalogue, timeout, Metrics()
        self._run_batch = run
        self._batcher: Batcher[BatchItem, ApiAnswer] = Batcher(
            self._run, on_batch=self._count_batch, **queue
        )
        self._is_alive = False
        self._probe: asyncio.Future[Any] | None = None
        self.metrics.waiting.set_function(lambda: len(self._batcher))
        self.metrics.ready.set_function(lambda: self.is_ready)

    async def image(self, request: ApiRequest) -> ApiAnswer:
        """An image.

        Raises:
            Refusal: If there will be none.
        """
        begun, file, reading = time.monotonic(), None, ("",) * len(_READ)
        if request.adapter is not None:
            file = self.catalogue.find(request.adapter)
            if file is None:
                raise Refusal(404, f"there is no adapter {request.adapter!r}; see /v1/adapters")
            try:
                extra = self.catalogue.metadata(request.adapter).extra
            except (ValueError, OSError) as error:
                raise Refusal(422, str(error)) from None
            reading = tuple("" if extra.get(n) in _USUAL else extra.get(n, "") for n in _READ)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        asked = self._batcher.submit(BatchItem(request, seed, file), (request.shared(), reading))
        try:
            answer = await asyncio.wait_for(asked, self.timeout)
        except QueueFullError as error:
            raise Refusal(429, str(error), {"Retry-After": str(error.retry_after)}) from None
        except asyncio.TimeoutError:
            raise Refusal(504, f"no image within {self.timeout:g} s; try again later") from None
        except WorkerLostError:
            raise Refusal(
                500, "the processes that sampled this request died; try again with fewer pixels"
            ) from None
        self.metrics.latency.observe(time.monotonic() - begun)
        return answer

    @property
    def is_ready(self) -> bool:
        """Whether a worker has answered since one was lost; asks, without waiting for it."""
        if not self._is_alive and (self._probe is None or self._probe.done()):
            self._probe = asyncio.gather(self._run([]), return_exceptions=True)
        return self._is_alive

    async def _run(self, batch: Sequence[BatchItem]) -> Sequence[ApiAnswer | Exception]:
        try:
            reply = await self._run_batch(batch)
        except WorkerLostError:
            self.metrics.lost.inc()
            self._is_alive = False
            raise
        self._is_alive = True
        self.metrics.loads.inc(reply.loads)
        return reply.answers

    def _count_batch(self, size: int, seconds: float) -> None:
        self.metrics.sizes.observe(size)
        self.metrics.batches.observe(seconds)


def make_app(service: Service, token: str | None) -> FastAPI:
    """The API of a service.

    Args:
        service: The service.
        token: What requests must have as ``Authorization: Bearer``; None lets this machine's users
            alone ask.
    """
    app = FastAPI(
        title="dora-diffusion",
        description="Images of many adapters over one base model.",
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
    )
    app.add_middleware(_Gate, token=token, count=service.metrics.requests)
    if token is None:
        # A web page can make its own name mean this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL_NAMES)

    @app.exception_handler(Refusal)
    async def refuse(_: Any, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"detail": refusal.line}, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(_: Any, error: RequestValidationError) -> JSONResponse:
        lines = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": "; ".join(lines)}, 422)

    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    png: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}}, "description": "The image."}
    }

    @app.post("/v1/images", response_class=Response, responses=png)
    async def generate(request: ApiRequest) -> Response:
        """Generate an image; its seed is in `X-Seed`, what had no effect in `X-Notes` (JSON)."""
        answer = await service.image(request)
        notes = {"X-Notes": json.dumps(answer.notes)} if answer.notes else {}
        headers = {"X-Seed": str(answer.seed)} | notes
        return Response(answer.png, media_type="image/png", headers=headers)

    @app.get("/v1/adapters")
    def list_adapters() -> list[dict[str, str | None]]:
        """List the adapters that are there now; one that cannot be read says why."""
        return [_described(service.catalogue, name) for name in service.catalogue.scan()]

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer as long as the server runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Answer 200 if images can be had, 503 until a replica has loaded the model."""
        if not service.is_ready:
            raise Refusal(503, "no replica answers yet", {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _described(catalogue: Catalogue, name: str) -> dict[str, str | None]:
    try:
        metadata = catalogue.metadata(name)
    except (ValueError, OSError) as error:
        return {"name": name, "trigger": None, "family": None, "problem": str(error)}
    return {"name": name, "trigger": metadata.trigger, "family": metadata.family, "problem": None}


class _Gate:
    """Refuses whoever lacks the token, and bodies that are too large, before anything is read."""

    def __init__(self, app: Any, token: str | None, count: Any) -> None:
        self.app, self.token, self.count = app, token, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count.labels(str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        await (refusal or self.app)(scope, receive, counting)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self.token is not None and path not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                line = "give the server's token: 'Authorization: Bearer TOKEN'"
                return JSONResponse({"detail": line}, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        is_unknown = b"transfer-encoding" in headers or not length.isdigit()
        if is_unknown or int(length) > _MOST_BYTES:
            line = f"a request has a Content-Length, of at most {_MOST_BYTES} bytes"
            return JSONResponse({"detail": line}, 413)
        return None
