"""Settings refused before Ray starts; and Ray itself, once, with a replica that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from dora_diffusion import SamplingSettings, generate_images
from dora_diffusion.cluster.commands import ServeSettings
from dora_diffusion.cluster.serving import deploy
from dora_diffusion.cluster.serving.deploy import TOKEN_VARIABLE, deployed, read_token
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.sampling.load import load_adapted
from tests.refusal import refused
from tests.waiting import WAIT_SECONDS, wait_until


def serve_settings(base: str = "base", **values: Any) -> ServeSettings:
    return ServeSettings(base=base, **values)


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        *(("host", {"host": host}, "lets others ask this server")
          for host in ("0.0.0.0", "192.168.1.7", "::")),
        ("host", {"host": "no host"}, "'no host'"),
        ("replica_gpus", {"replica_gpus": 1.5}, "1.5"),
        ("address", {"address": "ray://head:10001"}, "run serve on a node of the cluster"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_open_or_cannot_be_is_refused(setting, values, words, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with refused(setting, words):
        read_token(serve_settings(**values))


def test_an_application_is_named_and_reached_by_its_settings():
    assert serve_settings(host="0.0.0.0").url == "http://0.0.0.0:8000"
    assert serve_settings(host="::1", port=9).url == "http://[::1]:9"
    assert serve_settings(replica_gpus=2.0).application != serve_settings(port=9).application


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(serve_settings()) is None
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("  file-token-of-20-char\n", encoding="utf-8")
    monkeypatch.setenv(TOKEN_VARIABLE, "environment-token")
    tokens = [read_token(serve_settings(token_file=one)) for one in (file, None)]
    assert tokens == ["file-token-of-20-char", "environment-token"]
    assert read_token(serve_settings(host="0.0.0.0")) == "environment-token"
    for text, line in (
        ("", "is empty"),
        ("short", "at least 16 ASCII"),
        ("a b\nc" * 9, "one line"),
    ):
        file.write_text(text, encoding="utf-8")
        with refused("token_file", line):
            read_token(serve_settings(token_file=file))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
def test_a_token_that_others_can_read_is_said(tmp_path, recwarn):
    file = tmp_path / "token"
    file.write_text("t" * 20, encoding="utf-8")
    for mode in (0o600, 0o400):
        file.chmod(mode)
        assert read_token(serve_settings(token_file=file)) == "t" * 20
    assert [each for each in recwarn if each.category is UserWarning] == []
    for mode in (0o644, 0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.warns(UserWarning, match="others can read .*token; run 'chmod 600"):
            assert read_token(serve_settings(token_file=file)) == "t" * 20


def test_without_ray_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r'run pip install "ray\[serve\]"$'),
        deployed(serve_settings()),
    ):
        pass


def test_why_replicas_do_not_start_is_their_error():
    """Ray Serve has it as the last line of a message, and raises an error without it."""
    text = (
        "The deployment failed to start 3 times in a row. See controller logs. Error:\n"
        "ray::ServeReplica:x.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)\n"
        "    raise ModelNotFoundError(...) from error\n"
        "dora_diffusion.models.locate.ModelNotFoundError: no model at a/b: name a folder\n\n"
    )
    application = SimpleNamespace(deployments={"replica": SimpleNamespace(message=text)})
    status = SimpleNamespace(applications={"mine": application})
    assert deploy._reason(status, "mine") == "no model at a/b: name a folder"
    assert deploy._reason(status, "gone") == ""
    application.deployments.clear()
    assert deploy._reason(status, "mine") == ""


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_a_model_that_is_not_there_is_named():
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    with (
        pytest.raises(
            ConfigError, match=r"not be started: no embedded model is called 'tiny': choose tiny-sd"
        ),
        deployed(serve_settings("embedded:tiny")),
    ):
        pass


def test_a_replica_answers_in_a_thread_and_stops_for_nobody(monkeypatch, clock):
    begun, stopped = threading.Event(), threading.Event()

    class Model:
        busy_since = None

        def answer(self, asked, is_given_up):
            if asked != ["long"]:
                return list(asked)
            begun.set()
            wait_until(is_given_up)
            stopped.set()

    async def leave():
        asked = asyncio.ensure_future(replica.answer(["long"]))
        await asyncio.to_thread(begun.wait)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.to_thread(stopped.wait)

    monkeypatch.setattr(deploy, "_close_door", lambda: None)  # For all of this process.
    monkeypatch.setattr(deploy.Engine, "load", lambda *options: Model())
    replica = deploy.Replica(serve_settings(timeout=60))
    assert asyncio.run(replica.answer([1, 2])) == [1, 2]
    asyncio.run(leave())
    time = clock(deploy)
    for seconds, is_hung in ((None, False), (50, False), (61, True)):
        Model.busy_since = None if seconds is None else time.now - seconds
        with pytest.raises(RuntimeError) if is_hung else contextlib.nullcontext():
            replica.check_health()


def test_a_replica_has_no_port_that_unpickles_what_anybody_sends(monkeypatch):
    aio = pytest.importorskip("grpc.aio", reason="it comes with the extra ray")
    server = aio._server.Server
    monkeypatch.setattr(server, "add_insecure_port", server.add_insecure_port)
    monkeypatch.setattr(deploy.Engine, "load", lambda *options: None)
    opened = []

    async def start():
        found = aio.server()
        opened.append(found.add_insecure_port("127.0.0.1:0"))
        await found.start()
        await found.stop(None)

    asyncio.run(start())
    deploy.Replica(serve_settings())
    asyncio.run(start())
    assert opened[0] > 0
    assert opened[1] == 0


@pytest.fixture
def served(sd1_folder, random_adapter, tmp_path):
    """A folder of adapters, and twelve requests with their images."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    files = [None]
    for seed in range(3):
        adapter = AdapterFile(
            random_adapter(sd1_folder, seed=seed, every=7), AdapterMetadata("sd1")
        )
        files.append(write_adapter(tmp_path / "known" / f"{seed}.safetensors", adapter))
    settings, expected = SamplingSettings(steps=2, width=64, height=64), []
    for number in range(12):
        alone, _ = load_adapted(sd1_folder, files[number % 4], device="cpu")
        expected += generate_images(alone, "a dog", [number], settings)
    names = [file and file.stem for file in files]
    requests = [
        {"prompt": "a dog", "adapter": names[number % 4], "seed": number, "steps": 2,
         "width": 64, "height": 64} for number in range(12)
    ]  # fmt: skip
    return tmp_path / "known", requests, expected


class Server:
    """The command, in a process of its own."""

    def __init__(self, base, folder, port, token):
        command = [sys.executable, "-m", "dora_diffusion", "serve", "--base", str(base)]
        command += ["--adapters", str(folder), "--port", str(port), "--batch_size", "4"]
        self.lines, self.port = [], port
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, TOKEN_VARIABLE: token},
        )  # fmt: skip
        self.headers = {"Authorization": f"Bearer {token}"}

    def wait(self, text):
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return self
        raise AssertionError(self.lines)

    def get(self, path):
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.get(url, headers=self.headers, timeout=WAIT_SECONDS)

    def ask(self, request):
        url = f"http://127.0.0.1:{self.port}/v1/images"
        return httpx.post(url, json=request, headers=self.headers, timeout=WAIT_SECONDS)

    def processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self):
        """The processes with a model."""
        titles = [(process, " ".join(process.cmdline())) for process in self.processes()]
        return [p for p, title in titles if "ServeReplica:dora-diffusion" in title]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.read()
        return self.process.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGSTOP"])
def test_on_ray_no_request_is_lost_with_a_replica(ending, served, sd1_folder, free_port):
    """Answers are those of each adapter alone, before and after the replica is killed or hangs."""
    folder, requests, expected = served
    server = Server(sd1_folder, folder, free_port(), "t" * 20).wait("is ready")
    try:
        assert server.get("/ready").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{server.port}/v1/adapters").status_code == 401
        with ThreadPoolExecutor(12) as threads:
            for is_disturbed in (False, True):
                (replica,) = server.replicas()
                answers = [threads.submit(server.ask, request) for request in requests]
                if is_disturbed:
                    while "dora_queue_length 0.0" in server.get("/metrics").text:
                        assert not all(answer.done() for answer in answers)
                    replica.send_signal(getattr(signal, ending))
                for answer, image in zip(answers, expected, strict=True):
                    assert answer.result().status_code == 200, answer.result().text
                    found = np.asarray(Image.open(io.BytesIO(answer.result().content)), np.int16)
                    assert abs(found - np.asarray(image, np.int16)).max() <= 1
        assert replica not in server.replicas()
        assert server.get("/ready").status_code == 200
        assert "dora_workers_lost_total 0.0" not in server.get("/metrics").text
    finally:
        server.end()


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_a_rolling_restart_loses_nothing_and_nothing_is_open_to_others(
    served, sd1_folder, free_port
):
    """Two servers end one after the other, while twelve clients ask."""
    folder, requests, _ = served
    ports = free_port(), free_port()
    servers = [Server(sd1_folder, folder, port, "t" * 20) for port in ports]
    started, ended = [server.wait("is ready") for server in servers], threading.Event()

    def client(request):
        codes = []
        while not codes or not ended.is_set():
            for server in started:
                with contextlib.suppress(httpx.TransportError):
                    codes.append(server.ask(request).status_code)
                    if codes[-1] != 503:
                        break
                    codes.pop()
        return codes

    try:
        second = Server(sd1_folder, folder, ports[0], "t" * 20)
        assert second.process.wait() == 1
        for process in (server.process for server in servers):
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
                for each in child.net_connections("inet"):
                    if each.status == psutil.CONN_LISTEN:
                        address = ipaddress.ip_address(each.laddr.ip)
                        mapped = getattr(address, "ipv4_mapped", None) or address
                        assert mapped.is_loopback, child.cmdline()
        with ThreadPoolExecutor(12) as threads:
            clients = [threads.submit(client, request) for request in requests]
            for place in (0, 1):
                assert servers[place].end() == 0
                started[place] = Server(sd1_folder, folder, ports[place], "t" * 20).wait("is ready")
                servers[place] = started[place]
            ended.set()
            assert {code for each in clients for code in each.result()} == {200}
    finally:
        for server in servers:
            server.end()
