"""The HTTP server: an exclusive port, limits on time and connections, and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from dora_diffusion.cluster.serving.api import Service
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.system import STOP_SIGNALS

# A client must send its whole request within this time. With more incomplete requests than the
# limit, the oldest is disconnected.
REQUEST_SECONDS = 20.0
MOST_PARTIAL = 256
# Connections with a complete request, besides the requests that wait for an image.
_MORE_CONNECTIONS = 512
# Seconds at shutdown for sending responses to slow clients.
_LAST_SECONDS = 10


def listen(host: str, port: int) -> socket.socket:
    """Open an exclusive socket; connections wait until it is served.

    Raises:
        ConfigError: If the address is in use, or not an address of this machine.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = infos[0][0], infos[0][4]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {host} ({_reason(error)}); end the program that has "
            "it, or give another --port or --host",
            "port",
        ) from error


def _reason(error: OSError) -> str:
    """Return the error's reason, without what `socket.create_server` adds."""
    is_name = isinstance(error, socket.gaierror)
    return str(error.strerror) if is_name else os.strerror(error.errno or 0)


class _Protocol(H11Protocol):
    """Connection that is closed if its request remains incomplete."""

    partial: ClassVar[dict[_Protocol, asyncio.TimerHandle]] = {}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._unwatch()
        elif self not in self.partial:
            self.partial[self] = self.loop.call_later(REQUEST_SECONDS, self._give_up)
            if len(self.partial) > MOST_PARTIAL:
                next(iter(self.partial))._give_up()

    def _unwatch(self) -> None:
        if timer := self.partial.pop(self, None):
            timer.cancel()

    def _give_up(self) -> None:
        self._unwatch()
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.conn.trailing_data[0] if is_idle else not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n")
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run` installs its own handlers.


async def run(
    app: FastAPI, service: Service, listening: socket.socket, on_start: Callable[[], None]
) -> None:
    """Serve until a signal; then finish the accepted requests and refuse new ones.

    A second signal ends the server at once.

    Args:
        app: The app from `make_app`.
        service: The service of the app.
        listening: The socket from `listen`.
        on_start: Called when images can be generated.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=service.capacity + MOST_PARTIAL + _MORE_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server, loop = _Server(config), asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        await service.end()
        server.should_exit = True

    def begin_end() -> None:
        server.should_exit = server.force_exit = bool(ending)
        ending.append(loop.create_task(end()))

    def handle(*_: object) -> None:
        loop.call_soon_threadsafe(begin_end)

    await service.start()
    # Signals ignored by `nohup` and similar programs stay ignored.
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    previous = {n: signal.signal(n, handle) for n in STOP_SIGNALS if n not in ignored}
    try:
        serving = loop.create_task(server.serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        on_start()
        await serving
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
