"""The HTTP API: FastAPI on top of `Service`, which is independent of HTTP."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer

from dora_diffusion.cli.commands.parser import nearest_name
from dora_diffusion.cluster.serving.batcher import Batcher, QueueFullError, WorkerLostError
from dora_diffusion.cluster.serving.catalogue import Catalogue, twin_problem
from dora_diffusion.cluster.serving.engine import (
    ApiAnswer,
    ApiRequest,
    BatchItem,
    Refusal,
    Reply,
    refusal_of,
)
from dora_diffusion.config.flag_map import removal
from dora_diffusion.config.wording import counted
from dora_diffusion.formats.adapter.metadata import READING, ZERO_TERMINAL_SNR
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.checkpoint.schedule import EPSILON, PREDICTION
from dora_diffusion.system import is_loopback, split_host

if TYPE_CHECKING:
    from dora_diffusion.formats.checkpoint.weights import ModelWeights

# Routes without authentication.
_OPEN = ("/health", "/ready", "/openapi.json")
# Routes that programs poll every few seconds; only failures are logged.
_PROBES = ("/health", "/ready", "/metrics")
# Metadata on noise schedule and prompts, equal in a batch, and the values that are defaults.
_READ = (PREDICTION, ZERO_TERMINAL_SNR, *READING)
_USUAL = ("", EPSILON, "False", "0")
_MOST_BYTES = 64 * 1024
# Limit of the header with notes: clients and proxies refuse headers of 8 KB or less.
_MOST_NOTES = 2048
# nginx's status for a client that disconnected before the response.
_GONE = 499
_CLOSE = {"Connection": "close"}
_LOG = logging.getLogger("dora_diffusion.cluster.serving")
Run = Callable[[Sequence[BatchItem]], Awaitable[Reply]]


class Metrics:
    """Prometheus metrics of ``/metrics``."""

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
        self.ready = add(Gauge, "ready", "1 if images can be generated, else 0.")

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return bytes(generate_latest(self.registry))


class Service:
    """Answers requests for images in batches.

    Args:
        catalogue: The adapters.
        run: Runs a batch on a free worker.
        count_workers: Returns the number of healthy workers.
        timeout: Seconds until a request times out.
        base: The base model's weights, to check adapters against; None checks only their files.
        queue: ``batch_size``, ``window``, ``capacity`` and ``workers`` of the `Batcher`.

    Attributes:
        is_ending: True once new requests are refused.
        capacity: Most requests that wait or run.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        run: Run,
        count_workers: Callable[[], Awaitable[int]],
        timeout: float,
        base: ModelWeights | None = None,
        **queue: Any,
    ) -> None:
        self.catalogue, self.timeout, self.metrics = catalogue, timeout, Metrics()
        self.is_ending, self._base = False, base
        self._problems: dict[tuple[object, ...], str | None] = {}
        self._run_batch, self._count_workers = run, count_workers
        self._pending: set[asyncio.Task[ApiAnswer]] = set()
        queued: Batcher[BatchItem, ApiAnswer] = Batcher(self._run, **queue)
        self._batcher = queued
        self.capacity = queued.capacity + queued.workers * queued.batch_size
        self.metrics.waiting.set_function(lambda: len(self._batcher))

    async def image(self, request: ApiRequest) -> ApiAnswer:
        """Generate an image.

        Raises:
            Refusal: If the image cannot be generated.
        """
        if self.is_ending:
            raise Refusal(503, "this server is ending; ask another", {"Retry-After": "5"} | _CLOSE)
        begun = time.monotonic()
        file, reading = self._find(request.adapter)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        task = asyncio.ensure_future(
            self._batcher.submit(BatchItem(request, seed, file), (request.shared, reading))
        )
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        try:
            answer = await asyncio.wait_for(task, self.timeout)
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

    def _find(self, name: str | None) -> tuple[Path | None, tuple[str, ...]]:
        """Return the file of an adapter, and its metadata that must be equal in a batch.

        Raises:
            Refusal: If the adapter does not exist or cannot be read.
        """
        file = None if name is None else self.catalogue.find(name)
        try:
            extra = {} if file is None else self.catalogue.metadata(file).extra
        except FileNotFoundError:
            file = None
        except Exception as error:
            raise refusal_of(error, file) from None
        if file is None and name is not None:
            raise Refusal(404, f"there is no adapter {name!r}; see /v1/adapters")
        return file, tuple("" if extra.get(n) in _USUAL else extra.get(n, "") for n in _READ)

    def adapters(self) -> list[dict[str, str | None]]:
        """List the current adapters; the ones that no request can use have a ``problem``."""
        listed: list[dict[str, str | None]] = []
        for name, file in self.catalogue.scan().items():
            row: dict[str, str | None] = dict.fromkeys(("name", "trigger", "family", "problem"))
            try:
                metadata = self.catalogue.metadata(file)
                row["problem"] = self._problem(file)
            except FileNotFoundError:
                continue  # deleted meanwhile
            except Exception as error:
                row["problem"] = refusal_of(error, file).line
            else:
                row |= {"trigger": metadata.trigger, "family": metadata.family}
            listed.append(row | {"name": name})
        for name, served in self.catalogue.twins.values():
            problem = twin_problem(name, served.parent.name)
            listed.append({"name": name, "trigger": None, "family": None, "problem": problem})
        return listed

    def counted_adapters(self) -> str:
        """Return the number of adapters that serve, and of those with a problem, as a text."""
        problems = [row["problem"] for row in self.adapters()]
        unusable = len(problems) - problems.count(None)
        others = f" ({unusable} more with a problem: see /v1/adapters)" if unusable else ""
        return counted(problems.count(None), "adapter") + others

    def _problem(self, file: Path) -> str | None:
        """Return why no request can use an adapter; each version of a file is read once.

        Raises:
            OSError: If it cannot be opened now.
        """
        from dora_diffusion.formats.adapter.file import read_adapter

        found = find_adapter(file)
        status = found.stat()
        key = found, status.st_mtime_ns, status.st_size
        if key not in self._problems:
            try:
                read_adapter(found, self._base)
                self._problems[key] = None
            except ValueError as error:
                self._problems[key] = refusal_of(error, file).line
        return self._problems[key]

    async def start(self) -> None:
        """Wait until a worker responds."""
        await self._run_batch([])

    async def end(self) -> None:
        """Refuse new requests, and wait for the accepted ones."""
        self.is_ending = True
        while self._pending:
            await asyncio.wait(self._pending)

    async def is_ready(self) -> bool:
        """Return whether images can be generated."""
        is_ready = not self.is_ending and await self._count_workers() > 0
        self.metrics.ready.set(is_ready)
        return is_ready

    async def _run(self, batch: Sequence[BatchItem]) -> Sequence[ApiAnswer | Exception]:
        begun = time.monotonic()
        try:
            reply = await self._run_batch(batch)
        except WorkerLostError:
            self.metrics.lost.inc()
            raise
        self.metrics.batches.observe(time.monotonic() - begun)
        self.metrics.sizes.observe(len(batch))
        self.metrics.loads.inc(reply.loads)
        for answer in reply.answers:
            if isinstance(answer, Refusal) and answer.defect:
                _LOG.error("a request failed: %s", answer.defect)
        return reply.answers


def make_app(service: Service, token: str | None) -> FastAPI:
    """Create the API of a service.

    Args:
        service: The service.
        token: Token that requests must send as ``Authorization: Bearer``. None accepts only
            requests from this machine.
    """
    app = FastAPI(
        title="dora-diffusion",
        description="Images of many adapters over one base model.",
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
        # FastAPI's documentation pages load scripts from other sites and ask for the token.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(_Gate, token=token, service=service)

    @app.exception_handler(Refusal)
    async def refuse(_: Any, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"detail": refusal.line}, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(_: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": "; ".join(map(value_line, error.errors()))}, 422)

    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    png: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}}, "description": "The image."}
    }

    @app.post("/v1/images", response_class=Response, responses=png)
    async def generate(request: ApiRequest, http: Request) -> Response:
        """Generate an image. Its seed is in `X-Seed`, and warnings are in `X-Notes` (JSON)."""
        http.scope["adapter"] = request.adapter
        task = asyncio.ensure_future(service.image(request))
        disconnect = asyncio.ensure_future(http.receive())
        try:
            await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return Response(status_code=_GONE)
            answer = task.result()
        finally:
            task.cancel()
            disconnect.cancel()
        notes = {"X-Notes": _notes_header(answer.notes)} if answer.notes else {}
        headers = {"X-Seed": str(answer.seed)} | notes
        return Response(answer.png, media_type="image/png", headers=headers)

    @app.get("/v1/adapters")
    def list_adapters() -> list[dict[str, str | None]]:
        """List the current adapters; the ones that no request can use have a `problem`."""
        return service.adapters()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer 200 while the server runs."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Answer 200 if images can be generated, else 503."""
        if not await service.is_ready():
            line = "this server is ending" if service.is_ending else "no replica is healthy"
            raise Refusal(503, line, {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        await service.is_ready()
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def value_line(error: Mapping[str, Any]) -> str:
    """Return a validation error as one line: the field's name and the problem."""
    _, *field = error["loc"]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}, at character {field[0]}"
    name = ".".join(map(str, field))
    if error["type"] == "extra_forbidden":
        if refusal := removal(name):
            return refusal
        meant = nearest_name(name, ApiRequest.model_fields)
        return f"there is no field {name}" + (f" (did you mean {meant}?)" if meant else "")
    return f"{name or 'the body'}: {error['msg']}"


def _notes_header(notes: Sequence[str]) -> str:
    """Return notes as JSON, with long ones truncated so that all fit into a header."""
    longest = max(map(len, notes))
    while len(text := json.dumps([_cut(note, longest) for note in notes])) > _MOST_NOTES:
        longest = longest * 9 // 10
    return text


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


class _Gate:
    """ASGI middleware that logs and counts requests, and refuses some before reading their body.

    It refuses requests without the token, requests from web pages under another host name (DNS
    rebinding), and large bodies.
    """

    def __init__(self, app: Any, token: str | None, service: Service) -> None:
        self.app, self.token, self.service = app, token, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = _GONE, time.monotonic()

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.service.is_ending:  # The server closes all connections soon.
                    headers = [h for h in message["headers"] if h[0] != b"connection"]
                    message["headers"] = [*headers, (b"connection", b"close")]
            await send(message)

        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        try:
            await (refusal or self.app)(scope, receive, noting)
        finally:
            self.service.metrics.requests.labels(str(status)).inc()
            if status != 200 or scope["path"] not in _PROBES:
                _LOG.info(_log_line(scope, status, time.monotonic() - begun))

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        host = split_host(headers.get(b"host", b"").decode("latin-1"))[0]
        if self.token is None and not is_loopback(host):
            line = "without a token this server answers to localhost alone, and not by other names"
            return JSONResponse({"detail": line}, 400, _CLOSE)
        if self.token is not None and path not in _OPEN:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            is_valid = hmac.compare_digest(token.strip(), self.token.encode())
            if scheme.lower() != b"bearer" or not is_valid:
                line = "give the server's token: 'Authorization: Bearer TOKEN'"
                challenge = {"WWW-Authenticate": "Bearer"} | _CLOSE
                return JSONResponse({"detail": line}, 401, challenge)
        length = headers.get(b"content-length", b"0")
        is_unknown = b"transfer-encoding" in headers or not length.isdigit()
        if is_unknown or int(length) > _MOST_BYTES:
            line = f"a request has a Content-Length, of at most {_MOST_BYTES} bytes"
            return JSONResponse({"detail": line}, 413, _CLOSE)
        return None


def _log_line(scope: Any, status: int, seconds: float) -> str:
    """Return a request as a line of JSON, without prompts and tokens."""
    facts = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "client": (scope.get("client") or ("",))[0],
        "request": _cut(f"{scope['method']} {scope['path']}", 200),
        "status": status,
        "seconds": round(seconds, 3),
    }
    return json.dumps(facts | {n: scope[n] for n in ("adapter",) if scope.get(n) is not None})
