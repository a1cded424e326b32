"""Publishing on the hub: the real client against a hub of our own on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.export.hub import HubError, check

TOKEN = "hf_token_for_the_test"


class FakeHub(ThreadingHTTPServer):
    """Answers what the client asks when it makes a repository and commits small files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self) -> None:
        """Be as it was before anybody asked for anything."""
        self.requests: list[tuple[str, str, str]] = []
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.is_private = True
        self.refuse = 0


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        self._say({"id": "ann/mug", "private": self.server.is_private, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._note()
        path = self.path.partition("?")[0]
        if self.server.refuse:
            self._say({"error": "You may not"}, self.server.refuse)
        elif path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._say({"url": f"{self.server.address}/ann/mug", "id": "ann/mug"})
        elif "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self._say({"files": files})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self._say({"commitUrl": f"{self.server.address}/ann/mug/commit/1", "commitOid": "1",
                       "hookOutput": ""})  # fmt: skip
        else:
            self._say({"errors": [], "warnings": []})  # the card's metadata are checked first

    def _note(self) -> None:
        token = str(self.headers.get("Authorization"))
        self.server.requests.append((self.command, self.path, token))

    def _say(self, answer: object, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    one = FakeHub()
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def hub(server: FakeHub) -> FakeHub:
    server.forget()
    return server


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-mug"
    (folder / "samples").mkdir(parents=True)
    (folder / "photos").mkdir()
    (folder / "photos" / "001.jpg").write_bytes(b"secret photo")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"adapter")
    (folder / "README.md").write_text("# sks mug\n", encoding="utf-8")
    (folder / "log.txt").write_text("secret log", encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (folder / "samples" / "adapted.png").write_bytes(b"image")
    (folder / "config.yaml").write_text(
        f"instance_data_dir: {folder}/photos\noutput_dir: {folder}\nrank: 8\n"
        "pretrained_model_name_or_path: org/model\n",
        encoding="utf-8",
    )
    return folder


CLIENT = """
import contextlib, io, json, sys
from huggingface_hub import constants
from dora_diffusion.cli.main import main

for line in sys.stdin:
    constants.ENDPOINT, *words = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["push", *words])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Pushed(NamedTuple):
    code: int
    stdout: str
    stderr: str


Push = Callable[..., Pushed]


@pytest.fixture(scope="module")
def push(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """Runs the command, in a process of its own: the client reads the environment once."""
    values = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
              "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT], env=os.environ | values, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, encoding="utf-8",
    ) as client:  # fmt: skip

        def run(folder: Path, *flags: str, address: str = server.address) -> Pushed:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(json.dumps([address, str(folder), "ann/mug", *flags]) + "\n")
            client.stdin.flush()
            return Pushed(*json.loads(client.stdout.readline()))

        yield run
        client.communicate()


def test_a_run_is_published_privately_without_photos_and_places(
    hub: FakeHub, run_folder: Path, push: Push
) -> None:
    done = push(run_folder)
    assert done.code == 0, done.stderr
    assert done.stdout.strip().endswith("ann/mug")
    created = hub.created
    assert created["name"] == "mug"
    assert created["organization"] == "ann"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert sorted(hub.files) == [
        "README.md", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors",
        "samples/adapted.png",
    ]  # fmt: skip
    assert hub.files["pytorch_lora_weights.safetensors"] == b"adapter"
    everything = b"".join(hub.files.values())
    assert str(run_folder.parent).encode() not in everything
    assert b"secret" not in everything
    assert b"instance_data_dir: photos" in hub.files["config.yaml"]
    assert b"pretrained_model_name_or_path: org/model" in hub.files["config.yaml"]
    asked = [(path, token) for _, path, token in hub.requests if path.startswith("/api/models/")]
    # How many requests, releases of the hub's library differ in.
    assert {token for _, token in asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_public_has_to_be_asked_for(hub: FakeHub, run_folder: Path, push: Push) -> None:
    hub.is_private = False
    assert push(run_folder, "--public").code == 0
    assert hub.created.get("private") is not True
    assert hub.created.get("visibility") != "private"


def test_a_repository_that_others_see_is_not_written_to_by_accident(
    hub: FakeHub, run_folder: Path, push: Push
) -> None:
    hub.is_private = False
    refused = push(run_folder)
    assert refused.code == 1
    assert "exists and is public" in refused.stderr
    assert hub.files == {}


def test_offline_nothing_is_asked(
    hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As all tests are."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    assert main(["push", str(run_folder), "ann/mug"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert hub.requests == []


def test_without_a_token_a_push_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_diffusion.export.hub.is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="set HF_TOKEN"):
        check("ann/mug")


def test_a_refusal_is_one_line_with_what_to_do(hub: FakeHub, run_folder: Path, push: Push) -> None:
    hub.refuse = 403
    refused = push(run_folder)
    assert refused.code == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: the hub refused ann/mug")
    assert "HF_TOKEN" in refused.stderr
    assert TOKEN not in refused.stderr


@pytest.mark.parametrize("name", ["mug", "a/b/c", "", "../x", "ann/mug\n", "ann /mug", "/mug"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(HubError, match="NAME/MODEL"):
        check(name)
