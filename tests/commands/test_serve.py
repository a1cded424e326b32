"""``dora-diffusion serve``: what it refuses before anything starts, and what it starts."""

from __future__ import annotations

import contextlib
import threading

import pytest

from dora_diffusion.cli import main
from dora_diffusion.serving import deploy
from dora_diffusion.serving.deploy import TOKEN_VARIABLE


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--host", "0.0.0.0"], "lets others ask this server; give --token_file, or set DORA_"),
        (["--adapters", "nowhere"], "nowhere does not exist; give a folder of adapters"),
        (["--base", "./nowhere"], "./nowhere does not exist"),
        (["--replicas", "0"], "replicas is 0; it must be at least 1"),
        (["--clip_skip", "-1"], "clip_skip is -1; it must not be negative"),
        (["--token_file", "nowhere"], "nowhere does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(flags, line, monkeypatch, last_line):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(deploy, "deployed", None)
    assert main(["serve", "--base", "embedded:tiny-sd", *flags]) == 1
    assert line in last_line()


def test_it_serves_until_it_is_interrupted(tmp_path, monkeypatch, capsys):
    served = []

    @contextlib.contextmanager
    def deployed(deployment):
        served.append(deployment)
        yield

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy, "deployed", deployed)
    monkeypatch.setattr(threading.Event, "wait", interrupted)
    monkeypatch.setenv(TOKEN_VARIABLE, "t" * 20)
    command = ["serve", "--base", "embedded:tiny-sd", "--adapters", str(tmp_path), "--queue", "9"]
    assert main([*command, "--host", "0.0.0.0", "--adapter_memory", "1.5", "--clip_skip", "1"]) == 0
    (deployment,) = served
    assert (deployment.capacity, deployment.adapter_memory) == (9, 1_500_000)
    assert (deployment.token, deployment.options["clip_skip"]) == ("t" * 20, 1)
    assert "http://0.0.0.0:8000/docs: 0 adapters" in capsys.readouterr().out
