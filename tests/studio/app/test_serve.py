"""The real server, asked directly: what it gives out, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.waiting import Clock

pytest.importorskip("gradio", reason="gradio is not installed")
import httpx

from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import JobQueue
from dora_diffusion.studio.jobs.store import UserError, Workspace
from dora_diffusion.studio.jobs.subjects import add_photos, new_subject
from dora_diffusion.studio.jobs.uploads import MAX_BYTES
from tests.studio.jobs.helpers import make, photo, pretend_running
from tests.waiting import WAIT_SECONDS

SAMPLES = Path(__file__).resolve().parents[3] / "samples"


class Served:
    """A running server and what it serves."""

    def __init__(self, launch: Launch) -> None:
        from dora_diffusion.studio.app.serve import start

        self.context: Context
        self.context, self.blocks, self.url = start(launch)
        # Nothing here may start a worker.
        self.context.queue.close()
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_SECONDS)

    def call(self, name: str, data: list[Any]) -> str:
        """Call a handler by its name, private or not, and return the server's last word."""
        found = [
            index for index, one in self.blocks.fns.items()
            if getattr(one.fn, "__qualname__", "").endswith(name)
        ]  # fmt: skip
        body = {"data": data, "fn_index": found[0], "session_hash": "test-session"}
        assert self.client.post("gradio_api/queue/join", json=body).status_code == 200
        params = {"session_hash": "test-session"}
        with self.client.stream("GET", "gradio_api/queue/data", params=params) as answer:
            for line in answer.iter_lines():
                if "process_completed" in line:
                    return line
        raise AssertionError("the server did not answer")

    def ask(self, index: int, data: list[Any], event: object = None) -> dict[str, Any]:
        """Call an endpoint by its number with the data of an event; what the server says."""
        session = f"session-{index}"
        body = {"data": data, "fn_index": index, "session_hash": session, "event_data": event}
        joined = self.client.post(
            "gradio_api/queue/join",
            content=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if joined.status_code != 200:
            return {"success": False, "output": {"error": joined.text}}
        params = {"session_hash": session}
        with self.client.stream("GET", "gradio_api/queue/data", params=params) as answer:
            for line in answer.iter_lines():
                if "process_completed" in line:
                    said: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    return said
        raise AssertionError("the server did not answer")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(Launch(runs_dir=tmp_path_factory.mktemp("served") / "runs", port=0))
    yield one
    one.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(
        Launch(
            runs_dir=tmp_path_factory.mktemp("locked") / "runs",
            auth="ann:correct horse",
        )
    )
    yield one
    one.blocks.close(verbose=False)


def test_an_app_starts_on_a_machine_as_slow_as_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[..., Clock]
) -> None:
    """Gradio's own limits, of five seconds for its server and of three for a page, are over."""
    from gradio import http_server, networking

    servers, run = [], http_server.Server.run
    clock(http_server).step = 60
    monkeypatch.setattr(networking, "url_ok", lambda url: False)
    monkeypatch.setattr(http_server.Server, "run", lambda one: None)  # Its port is taken.
    with pytest.raises(OSError, match="Cannot find empty port"):
        Served(Launch(runs_dir=tmp_path / "runs"))
    monkeypatch.setattr(http_server.Server, "run", lambda one: servers.append(one) or run(one))
    one = Served(Launch(runs_dir=tmp_path / "runs"))
    try:
        assert one.client.get("").status_code == 200
        # Any other one found its port taken meanwhile.
        assert [server.started for server in servers].count(True) == 1
    finally:
        one.blocks.close(verbose=False)


def file_of(served: Served, path: Path | str) -> httpx.Response:
    return served.client.get(f"gradio_api/file={path}")


def test_the_page_is_served(served: Served) -> None:
    answer = served.client.get("")
    assert answer.status_code == 200
    assert "DoRA studio" in answer.text
    assert str(served.client.base_url.port) in served.url
    assert served.client.base_url.port not in (None, 0)


def test_exports_and_images_are_given_out_and_nothing_else(served: Served) -> None:
    workspace = served.context.workspace
    job_id = make(workspace, "secret").name
    export = workspace.exports / "a.safetensors"
    export.write_bytes(b"x")
    assert file_of(served, export.resolve()).status_code == 200
    inside = workspace.root.resolve()
    for path in (
        inside / job_id / records.JOB,
        "/etc/passwd",
        Path(__file__).resolve(),
        f"{inside}/exports/../{job_id}/{records.JOB}",
        f"{inside}/exports/%2e%2e/{job_id}/{records.JOB}",
    ):
        assert file_of(served, path).status_code in (403, 404), path


def test_a_link_in_the_exports_is_not_a_way_out(served: Served, tmp_path: Path) -> None:
    secret = served.context.workspace.root / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    link = served.context.workspace.exports / "link.txt"
    link.symlink_to(secret.resolve())
    assert file_of(served, link.parent.resolve() / link.name).status_code in (403, 404)


def test_a_large_upload_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.blocks.max_file_size == MAX_BYTES == 100 * 2**20
    monkeypatch.setattr(served.blocks, "max_file_size", 2**20)
    files = {"files": ("a.png", b"\0" * (2**20 + 2**17))}
    assert served.client.post("gradio_api/upload", files=files).status_code == 413


def test_uploads_stay_inside_of_the_runs_folder(served: Served) -> None:
    name = "../../../../tmp/evil.png"
    answer = served.client.post("gradio_api/upload", files={"files": (name, b"x")})
    (path,) = answer.json()
    assert Path(path).resolve().is_relative_to(served.context.workspace.cache.resolve())


EVIL = ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example",
        "127.0.0.1@evil.example", "192.168.1.4:7860", "", "[::1].evil.example")  # fmt: skip
OTHER_ORIGINS = ("http://evil.example", "https://evil.example:7860", "http://localhost:8888",
                 "http://127.0.0.1", "null", "file://", "http://")  # fmt: skip


def requests_of(served: Served) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, address and body of what a page can ask for: each does something, or tells it."""
    export = served.context.workspace.exports / "mine.safetensors"
    export.write_bytes(b"x")
    join = {"data": [], "fn_index": 0, "session_hash": "rebound"}
    return [
        ("GET", "", {}), ("GET", "config", {}), ("GET", "gradio_api/info", {}),
        ("GET", f"gradio_api/file={export.resolve()}", {}), ("GET", "theme.css", {}),
        ("GET", "gradio_api/queue/data?session_hash=rebound", {}),
        ("GET", "gradio_api/heartbeat/rebound", {}),
        ("POST", "gradio_api/queue/join", {"json": join}),
        ("POST", "gradio_api/run/predict", {"json": join}),
        ("POST", "gradio_api/upload", {"files": {"files": ("a.png", b"x")}}),
        ("POST", "gradio_api/call/upload", {"json": join}),
    ]  # fmt: skip


@pytest.mark.parametrize("host", EVIL)
def test_a_name_that_a_web_page_has_made_mean_this_machine_is_refused(
    served: Served, host: str
) -> None:
    """DNS rebinding: the page's own name leads here, so that its scripts may read the answers."""
    before = files_of(served.context.workspace)
    for method, address, body in requests_of(served):
        answer = served.client.request(method, address, headers={"Host": host}, **body)
        assert answer.status_code in (400, 403), (address, answer.status_code)
        assert "DoRA studio" not in answer.text
    assert len(files_of(served.context.workspace) - before) == 1  # `requests_of` itself
    (served.context.workspace.exports / "mine.safetensors").unlink()


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_another_site_s_page_can_ask_for_nothing(served: Served, origin: str) -> None:
    for method, address, body in requests_of(served):
        answer = served.client.request(method, address, headers={"Origin": origin}, **body)
        assert answer.status_code == 403, (address, answer.status_code)
        assert "--allowed_host" in answer.text
    (served.context.workspace.exports / "mine.safetensors").unlink()


def test_another_site_can_link_to_the_page_but_not_hold_it_in_a_frame(served: Served) -> None:
    site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert served.client.get("", headers=site | {"Sec-Fetch-Dest": "document"}).status_code == 200
    for kind in ("iframe", "image", "script", "empty"):
        answer = served.client.get("", headers=site | {"Sec-Fetch-Dest": kind})
        assert answer.status_code == 403, kind
    ours = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "empty"}
    assert served.client.get("config", headers=ours).status_code == 200


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "localhost."])
def test_this_machine_s_own_page_can(served: Served, name: str) -> None:
    port = httpx.URL(served.url).port
    for headers in ({}, {"Origin": f"http://{name}:{port}"}):
        headers |= {"Host": f"{name}:{port}"}
        assert served.client.get("config", headers=headers).status_code == 200
        files = {"files": ("a.png", b"x")}
        answer = served.client.post("gradio_api/upload", files=files, headers=headers)
        assert answer.status_code == 200


def asked(guard: Any, kind: str, **headers: str) -> list[dict[str, Any]]:
    """Messages that the guard itself sends; none where it lets a request pass."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": f"{kind}.connect"}

    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(guard({"type": kind, "headers": named}, receive, send))
    return sent


def test_a_websocket_of_another_site_is_closed_before_it_opens() -> None:
    from dora_diffusion.studio.app.serve import Guard

    passed: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    shared: set[str] = set()
    guard = Guard(app, Launch(), shared)
    (closed,) = asked(guard, "websocket", host="evil.example")
    assert closed == {"type": "websocket.close", "code": 1008}
    assert asked(guard, "websocket", host="localhost:7860", origin="http://evil.example")
    assert asked(guard, "http")[0]["status"] == 403  # HTTP/1.0 needs no Host
    assert asked(guard, "http", host="abc.gradio.live", origin="https://abc.gradio.live")
    assert passed == []
    shared.add("abc.gradio.live")
    assert asked(guard, "http", host="abc.gradio.live", origin="https://abc.gradio.live") == []
    assert asked(guard, "websocket", host="localhost:7860", origin="http://localhost:7860") == []
    assert asked(guard, "lifespan") == []
    assert passed == ["http", "websocket", "lifespan"]


@pytest.mark.parametrize("job_id", ["../subjects", "..", "", 3, {"a": 1}])
@pytest.mark.parametrize(
    "handler", ["connect.<locals>.delete", "connect.<locals>.remove", "connect.<locals>.show"]
)
def test_private_endpoints_look_ids_up(served: Served, handler: str, job_id: object) -> None:
    before = sorted(served.context.workspace.root.rglob("*"))
    served.call(handler, [job_id])
    kept = sorted(served.context.workspace.root.rglob("*"))
    # Gradio's own temporary files come and go.
    assert [path for path in before if "cache" not in path.parts and path not in kept] == []


HOSTILE = (
    "../../../../etc/passwd", "merged/../../x", None, ["../x"],
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "a\0b\x1b[2J $(id)",
)  # fmt: skip


def filled(field: Any, value: object) -> object:
    """The value to send in a field: numbers and fixed choices as the page has them."""
    is_free = not hasattr(field, "choices") or not field.choices
    return value if is_free and type(field).__name__ in FREE else field.value


FREE = ("Api", "Dropdown", "Textbox", "State", "HTML", "File", "Gallery")


@pytest.mark.parametrize("first", [0, 3])
def test_no_handler_can_be_led_astray(
    served: Served, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every endpoint, private or not, with something else in its fields than the page sends."""
    workspace = served.context.workspace
    monkeypatch.setattr(
        "dora_diffusion.studio.jobs.image_generator.ImageGenerator._model", _no_model
    )
    before = files_of(workspace)
    refusals = []
    for index, one in served.blocks.fns.items():
        if one.fn is None or not one.inputs or one.fn.__name__ == "tick":
            continue
        value = HOSTILE[(first + index) % len(HOSTILE)]
        fields = [filled(field, value) for field in one.inputs]
        said = served.ask(index, fields, {"index": value, "what": value, "value": value})
        if not said["success"]:
            refusals.append(str(said["output"].get("error")))
            assert "this is a bug" not in refusals[-1], (one.fn, said)
            assert "Traceback" not in str(said), one.fn
    assert len(refusals) > 5
    new = files_of(workspace) - before
    assert before <= files_of(workspace)
    # An empty subject can be made by anybody who may use the page at all.
    assert all(path.name == "subject.json" for path in new), new


def files_of(workspace: Workspace) -> set[Path]:
    """All files in the runs folder but uploads and locks."""
    found = (path for path in workspace.root.rglob("*") if path.is_file() and path.name[0] != ".")
    return {path for path in found if workspace.cache not in path.parents}


def _no_model(*_: object) -> None:
    raise UserError("no model is loaded in this test")


def test_a_files_path_that_was_not_uploaded_is_refused(served: Served) -> None:
    subject = new_subject(served.context.workspace, "x")
    photo = SAMPLES / "bolt_mug" / "01.jpg"
    stolen = [{"path": str(photo), "meta": {"_type": "gradio.FileData"}}]
    said = served.call("<locals>.upload", [stolen, subject])
    assert json.loads(said.removeprefix("data: "))["success"] is False
    assert list((served.context.workspace.subjects / subject / "photos").iterdir()) == []


def test_a_page_does_not_hold_the_environment(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_ann")
    for address in ("", "config", "gradio_api/info"):
        assert "hf_secret_of_ann" not in served.client.get(address).text


def test_who_closes_the_app_is_told_what_continues_and_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dora_diffusion.studio.app import serve

    context = Context(Launch(runs_dir=tmp_path / "runs"))
    running, *_ = [make(context.workspace, title) for title in ("sks mug", "zwx dog", "qwe cat")]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        pretend_running(running, child)
        monkeypatch.setattr(serve, "start", lambda _: (context, MagicMock(), "http://127.0.0.1/"))
        monkeypatch.setattr(serve.signal, "signal", MagicMock())
        monkeypatch.setattr(serve.threading, "Event", MagicMock)
        serve.serve(Launch())
        child.kill()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "The app has ended.",
        "sks mug continues without it: start the app again to follow or stop it, or read "
        f"{running / records.LOG}",
        "Until the app is started again, these wait: zwx dog, qwe cat",
    ]


def test_who_starts_it_with_a_password_is_told_what_it_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dora_diffusion.studio.app import serve

    monkeypatch.setattr(serve, "start", lambda _: (MagicMock(), MagicMock(), "http://127.0.0.1/"))
    monkeypatch.setattr(serve.signal, "signal", MagicMock())
    monkeypatch.setattr(serve.threading, "Event", MagicMock)
    serve.serve(Launch(auth="ann:correct horse"))
    address, told, _ = capsys.readouterr().out.splitlines()
    assert address == "open http://127.0.0.1/"
    assert "All users see, change and delete the same photos and runs." in told


def test_without_the_password_nothing_is_given_out(locked: Served) -> None:
    image = locked.context.workspace.images / "a.png"
    image.write_bytes(b"x")
    for address in ("config", f"gradio_api/file={image.resolve()}", "gradio_api/info"):
        assert locked.client.get(address).status_code == 401
    body = {"data": [], "fn_index": 0, "session_hash": "a"}
    assert locked.client.post("gradio_api/queue/join", json=body).status_code == 401
    upload = locked.client.post("gradio_api/upload", files={"files": ("a.png", b"x")})
    assert upload.status_code == 401
    wrong = {"username": "ann", "password": "correct hors"}
    assert locked.client.post("login", data=wrong).status_code == 400
    right = {"username": "ann", "password": "correct horse"}
    assert locked.client.post("login", data=right).status_code == 200
    assert locked.client.get("config").status_code == 200


def test_a_page_s_job_is_that_of_who_is_logged_in(
    locked: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobQueue, "tick", lambda self: None)  # starts no worker
    workspace = locked.context.workspace
    subject = new_subject(workspace, "Rex", "dog")
    add_photos(workspace, subject, [photo(tmp_path / "a.jpg")])
    locked.client.post("login", data={"username": "ann", "password": "correct horse"})
    locked.call("_connect_look.<locals>.look", [subject, "embedded:tiny-sd", "", False])
    (folder,) = workspace.job_folders
    assert records.read_record(folder).owner == "ann"
