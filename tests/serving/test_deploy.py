"""What is refused before Ray starts; and Ray itself, once, with a replica that is killed."""

from __future__ import annotations

import asyncio
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from dora_diffusion import SamplingSettings, generate_images
from dora_diffusion.config import ConfigError
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.checkpoint.schedule import UNASKED
from dora_diffusion.generate import load_adapted
from dora_diffusion.serving import deploy
from dora_diffusion.serving.deploy import TOKEN_VARIABLE, Deployment, deployed, read_token
from tests.waiting import WAIT_SECONDS


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"host": "0.0.0.0"}, r"host 0.0.0.0 lets others ask this server; give --token_file"),
        ({"host": "192.168.1.7"}, "lets others ask this server"),
        ({"host": "::"}, "lets others ask this server"),
        ({"host": "no host"}, "host is 'no host'; it must be an address"),
        ({"port": 0}, "port is 0; it must be 1 to 65535"),
        ({"capacity": 0}, "capacity is 0; it must be at least 1"),
        ({"window": -1}, "window is -1; it must be 0 to 10"),
        ({"timeout": 0}, "timeout is 0; it must be more than 0"),
    ],
    ids=str,
)
def test_what_would_be_open_or_cannot_be_is_refused(values, line):
    with pytest.raises(ConfigError, match=line):
        Deployment("base", (), **values)
    assert Deployment("base", (), host="0.0.0.0", token="x" * 16).url == "http://0.0.0.0:8000"
    assert "xxxx" not in repr(Deployment("base", (), token="x" * 16))


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text("  file-token-of-20-char\n", encoding="utf-8")
    monkeypatch.setenv(TOKEN_VARIABLE, "environment-token")
    assert (read_token(file), read_token(None)) == ("file-token-of-20-char", "environment-token")
    for text, line in (
        ("", "is empty"),
        ("short", "at least 16 ASCII"),
        ("a b\nc" * 9, "one line"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=line):
            read_token(file)


def test_without_ray_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r'run pip install "ray\[serve\]"$'),
        deployed(Deployment("base", ())),
    ):
        pass


@pytest.mark.slow
def test_on_ray_no_request_is_lost_with_a_replica(sd1_folder, random_adapter, tmp_path):
    """Answers are those of each adapter alone, before and after the replica is killed."""
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
    options = {"schedule": UNASKED, "clip_skip": None, "max_token_length": None}
    deployment = Deployment(
        str(sd1_folder), (tmp_path / "known",), options, token="t" * 20, port=8799, batch_size=4
    )
    headers = {"Authorization": f"Bearer {deployment.token}"}

    def ask(number):
        name = files[number % 4] and files[number % 4].stem
        request = {"prompt": "a dog", "adapter": name, "seed": number, "steps": 2}
        with httpx.Client(base_url=deployment.url, headers=headers, timeout=WAIT_SECONDS) as client:
            return client.post("/v1/images", json={**request, "width": 64, "height": 64})

    with deployed(deployment), ThreadPoolExecutor(12) as threads:
        assert httpx.get(f"{deployment.url}/v1/adapters").status_code == 401
        for kills in (False, True):
            answers = [threads.submit(ask, number) for number in range(12)]
            if kills:
                (replica,) = _replicas()
                replica.kill()
            for number, answer in enumerate(answers):
                assert answer.result().status_code == 200, answer.result().text
                found = np.asarray(Image.open(io.BytesIO(answer.result().content)), np.int16)
                assert abs(found - np.asarray(expected[number], np.int16)).max() <= 1
        assert _replicas() != [replica]
        assert httpx.get(f"{deployment.url}/ready").status_code == 200
    wrong = Deployment("./nowhere", (), options)
    with pytest.raises(ConfigError, match=r"base \./nowhere does not exist"), deployed(wrong):
        pass


def _replicas():
    """The processes with a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if f"ServeReplica:{deploy._NAME}:{deploy._REPLICA}" in " ".join(process.cmdline()):
            found.append(process)
    return found


def test_a_replica_answers_in_a_thread(monkeypatch):
    class Model:
        def answer(self, asked):
            return list(asked)

    monkeypatch.setattr(deploy.Engine, "load", lambda *options: Model())
    replica = deploy.Replica(Deployment("base", ()))
    assert asyncio.run(replica.answer([1, 2])) == [1, 2]
