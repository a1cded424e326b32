"""The HTTP server on a port of this machine: its limits, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal

import httpx
import pytest

from dora_diffusion.cluster.serving import server as module
from dora_diffusion.cluster.serving.api import Service, make_app
from dora_diffusion.cluster.serving.catalogue import Catalogue
from dora_diffusion.cluster.serving.engine import ApiAnswer, Reply
from dora_diffusion.cluster.serving.server import listen, run
from dora_diffusion.config import ConfigError
from dora_diffusion.system import STOP_SIGNALS
from tests.cluster.serving.helpers import serving_log
from tests.refusal import refused
from tests.waiting import WAIT_SECONDS

pytest.importorskip("prometheus_client", reason="it comes with the extra ray")
LONG = WAIT_SECONDS
HALF = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n{"


async def until(condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(wait(), LONG)


class Workers:
    """Answer when they are let."""

    def __init__(self):
        self.free, self.begun, self.cancelled = (asyncio.Event() for _ in range(3))
        self.free.set()
        self.seeds = []

    async def count(self):
        return 1

    async def __call__(self, batch):
        self.seeds += [asked.seed for asked in batch]
        if batch:
            self.begun.set()
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Reply([ApiAnswer(b"png", asked.seed) for asked in batch], 0)


class Running:
    """A server in this loop."""

    def __init__(self, host="127.0.0.1", **queue):
        self.workers = Workers()
        self.service = Service(
            Catalogue([]), self.workers, self.workers.count, LONG, window=0.0, **queue
        )
        self.socket = listen(host, 0)
        self.host, self.port = self.socket.getsockname()[:2]

    async def __aenter__(self):
        started, app = asyncio.Event(), make_app(self.service, None)
        self.task = asyncio.ensure_future(run(app, self.service, self.socket, started.set))
        await asyncio.wait_for(started.wait(), LONG)
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=LONG)
        return self

    async def __aexit__(self, *error):
        await self.client.aclose()
        self.workers.free.set()
        if not self.task.done():
            signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(self.task, LONG)

    async def image(self, seed=0):
        return await self.client.post("/v1/images", json={"prompt": "a dog", "seed": seed})

    async def open(self, data):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(data)
        await writer.drain()
        return reader, writer


def test_a_port_in_use_is_refused_by_name():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):
            with refused("port", f"port {port} of {host} (Address already in"):
                listen(host, port)
    # And free again at once, whatever connections it had.
    listen("127.0.0.1", port).close()
    with refused("port", "80 of nowhere.invalid"):
        listen("nowhere.invalid", 80)


def test_it_is_ready_when_it_has_started_and_answers_by_every_address_of_this_machine():
    async def scenario(host, name):
        async with Running(host) as one:
            one.client.base_url = f"http://{name}:{one.port}"
            ready = await one.client.get("/ready")
            return ready.status_code, (await one.image()).status_code

    hosts = [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("0.0.0.0", "127.0.0.1")]
    with contextlib.suppress(ConfigError):
        listen("::1", 0).close()
        hosts += [("::1", "[::1]"), ("::", "[::1]"), ("::", "127.0.0.1")]
    for host, name in hosts:
        assert asyncio.run(scenario(host, name)) == (200, 200), (host, name)


@pytest.fixture
def as_in_a_terminal():
    """Whoever runs the tests in the background may have them ignore signals, as nohup does."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_answers_what_is_in_flight_refuses_what_is_new_and_ends(number):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    async def scenario():
        async with Running(capacity=8, batch_size=3) as one:
            one.workers.free.clear()
            # One is sampled, eight wait, three are more than that.
            asked = [asyncio.ensure_future(one.image(seed)) for seed in range(12)]
            await asyncio.wait_for(one.workers.begun.wait(), LONG)
            await until(lambda: sum(each.done() for each in asked) == 3)
            assert len(one.service._pending) == 9
            signal.raise_signal(number)
            await until(lambda: one.service.is_ending)
            late = await one.image(99)
            codes = [(await one.client.get(path)).status_code for path in ("/ready", "/health")]
            one.workers.free.set()
            answers = await asyncio.gather(*asked)
            await asyncio.wait_for(one.task, LONG)
            with pytest.raises(httpx.ConnectError):
                await one.image(100)
            return [answer.status_code for answer in answers], late, codes, one.workers.seeds

    statuses, late, codes, seeds = asyncio.run(scenario())
    assert sorted(statuses) == [200] * 9 + [429] * 3
    assert late.status_code == 503
    assert (late.headers["Connection"], late.headers["Retry-After"]) == ("close", "5")
    assert codes == [503, 200]
    assert len(seeds) == 9
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_second_signal_ends_it_at_once():
    async def scenario():
        async with Running() as one:
            one.workers.free.clear()
            asked = asyncio.ensure_future(one.image())
            await asyncio.wait_for(one.workers.begun.wait(), LONG)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            await asyncio.wait_for(one.task, LONG)
            asked.cancel()

    asyncio.run(scenario())


def test_of_two_servers_one_ends_and_twelve_clients_lose_nothing():
    async def scenario():
        async with Running(capacity=99) as one, Running(capacity=99) as other:
            answered, half = [], asyncio.Event()

            async def client(number):
                for seed in range(number, 96, 12):
                    for server in (other, one):  # The other is the one that ends.
                        # Its last connections may be cut, unread.
                        with contextlib.suppress(httpx.TransportError):
                            answer = await server.image(seed)
                            if answer.status_code != 503:
                                break
                    answered.append((answer.status_code, answer.headers.get("X-Seed")))
                    if len(answered) == 30:
                        half.set()

            clients = [asyncio.ensure_future(client(number)) for number in range(12)]
            await asyncio.wait_for(half.wait(), LONG)
            signal.raise_signal(signal.SIGTERM)
            await asyncio.gather(*clients)
            await asyncio.wait_for(other.task, LONG)
            return answered, one.workers.seeds, other.workers.seeds

    answered, ours, theirs = asyncio.run(scenario())
    assert sorted(answered) == sorted((200, str(seed)) for seed in range(96))
    # Each was sampled once.
    assert sorted(ours + theirs) == list(range(96))
    assert ours
    assert theirs


@pytest.mark.parametrize("data", [b"", b"POST /v1/im", HALF], ids=["nothing", "head", "body"])
def test_requests_that_do_not_become_whole_are_in_nobodys_way(data, monkeypatch):
    monkeypatch.setattr(module, "MOST_PARTIAL", 8)
    monkeypatch.setattr(module, "REQUEST_SECONDS", LONG)

    async def scenario():
        async with Running() as one:
            opened = [await one.open(data) for _ in range(30)]
            # The oldest ones make room, one for each that comes; a whole request takes none.
            for reader, _ in opened[:22]:
                assert await asyncio.wait_for(reader.read(), LONG) in (
                    b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n", b"",
                )  # fmt: skip
            for _ in range(3):
                assert (await one.client.get("/health")).status_code == 200
                assert (await one.image()).status_code == 200
            assert not any(reader.at_eof() for reader, _ in opened[-7:])
            for _, writer in opened:
                writer.close()

    asyncio.run(scenario())
    assert not module._Protocol.partial


@pytest.mark.parametrize("data", [b"", b"POST /v1/im", HALF], ids=["nothing", "head", "body"])
def test_a_request_has_a_limit_of_time_on_a_new_connection_and_a_used_one(data, monkeypatch):
    receive, received = module._Protocol.data_received, bytearray()

    def data_received(self, data):
        received.extend(data)
        receive(self, data)

    monkeypatch.setattr(module._Protocol, "data_received", data_received)
    monkeypatch.setattr(module, "REQUEST_SECONDS", LONG)

    async def scenario():
        async with Running() as one:
            head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            loop, partial = asyncio.get_running_loop(), module._Protocol.partial
            for first in (b"", head):
                received.clear()
                begun = loop.time()
                reader, writer = await one.open(first + data)
                await until(lambda sent=first + data: received == sent and partial)
                (timer,) = partial.values()
                assert begun + LONG <= timer.when() <= loop.time() + LONG
                timer._run()  # As if all of it had passed.
                answer = await asyncio.wait_for(reader.read(), LONG)
                assert (b"200 OK" in answer) == bool(first)
                assert (b"408 Request Timeout" in answer) == bool(data)
                writer.close()

    asyncio.run(scenario())


def test_who_has_gone_is_not_sampled_for(caplog):
    async def scenario():
        async with Running() as one:
            one.workers.free.clear()
            body = json.dumps({"prompt": "a dog"}).encode()
            head = HALF.replace(b"40", str(len(body)).encode()).removesuffix(b"{")
            head = head.replace(b"\r\n\r\n", b"\r\nContent-Type: application/json\r\n\r\n")
            _, writer = await one.open(head + body)
            await asyncio.wait_for(one.workers.begun.wait(), LONG)
            writer.close()
            await asyncio.wait_for(one.workers.cancelled.wait(), LONG)
            one.workers.free.set()
            return (await one.image()).status_code

    with caplog.at_level(logging.INFO, "dora_diffusion.cluster.serving"):
        assert asyncio.run(scenario()) == 200
    assert [json.loads(line)["status"] for line in serving_log(caplog)] == [499, 200]


def test_who_asks_while_the_model_is_loaded_waits():
    async def scenario():
        one = Running()
        early = asyncio.ensure_future(asyncio.to_thread(
            httpx.get, f"http://127.0.0.1:{one.port}/health", timeout=LONG))  # fmt: skip
        async with one:
            return (await early).status_code

    assert asyncio.run(scenario()) == 200
