"""``dora-diffusion serve``: what it refuses before anything starts, and what it starts."""

from __future__ import annotations

import contextlib
import signal

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.cluster.serving import deploy
from dora_diffusion.cluster.serving.deploy import TOKEN_VARIABLE
from dora_diffusion.cluster.serving.engine import Reply

pytest.importorskip("prometheus_client", reason="it comes with the extra ray")


def test_it_serves_until_it_is_interrupted(tmp_path, monkeypatch, capsys):
    from dora_diffusion.cluster.serving import server

    served = []

    class Replicas:
        async def answer(self, batch):
            return Reply([], 0)

        async def count(self):
            return 1

    @contextlib.contextmanager
    def deployed(deployment):
        served.append(deployment)
        yield Replicas()

    start, run, listen = [], server.run, server.listen

    def listen_anywhere(host, port):
        start.append((host, port))
        return listen(host, 0)  # A port that is chosen before may be another program's by now.

    async def interrupted(app, service, listening, on_start):
        def end():
            start.append(listening.getsockname()[0])
            on_start()
            signal.raise_signal(signal.SIGTERM)

        await run(app, service, listening, end)

    monkeypatch.setattr(deploy, "deployed", deployed)
    monkeypatch.setattr(server, "run", interrupted)
    monkeypatch.setattr(server, "listen", listen_anywhere)
    monkeypatch.setenv(TOKEN_VARIABLE, "t" * 20)
    command = ["serve", "--base", "embedded:tiny-sd", "--adapters", str(tmp_path), "--queue", "9"]
    command += ["--adapter_memory", "1.5", "--clip_skip", "1"]
    assert main([*command, "--host", "::1", "--port", "8123"]) == 0
    (settings,) = served
    assert (settings.queue, settings.adapter_bytes) == (9, 1_500_000)
    assert (deploy.read_token(settings), settings.model_options["clip_skip"]) == ("t" * 20, 1)
    assert start == [("::1", 8123), "::1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["http://[::1]:8123 is ready: 0 adapters; Ctrl-C ends it", "ended"]
