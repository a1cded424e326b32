"""The HTTP API over workers that are a function, without Ray and without a model."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
from typing import get_args

import httpx
import pytest

from dora_diffusion.cluster.serving.api import Service, make_app
from dora_diffusion.cluster.serving.batcher import WorkerLostError
from dora_diffusion.cluster.serving.catalogue import Catalogue
from dora_diffusion.cluster.serving.engine import ApiAnswer, ApiRequest, Refusal, Reply
from dora_diffusion.export.files import open_model
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from tests.cluster.serving.helpers import run, serving_log

pytest.importorskip("prometheus_client", reason="it comes with the extra ray")

TOKEN = "a-token-of-24-characters"


@pytest.fixture
def folder(tmp_path, random_layer):
    import torch

    layers = {"unet.conv_in": random_layer(torch.ones(8, 4, 3, 3), torch.Generator())}
    for name, extra in (("dog", {}), ("cat", {}), ("v", {"prediction_type": "v_prediction"})):
        metadata = AdapterMetadata("sd1", trigger=f"sks {name}", extra=extra)
        write_adapter(tmp_path / f"{name}.safetensors", AdapterFile(layers, metadata))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    return tmp_path


# A number as text, for each field that is one.
NUMBERS = {
    name: "1" for name, field in ApiRequest.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
}  # fmt: skip
assert len(NUMBERS) > 6


class Workers:
    """Answers with what was asked, as its seed's image; ``fails`` is raised, a batch at a time."""

    def __init__(self, seconds=0.0):
        self.batches, self.fails, self.seconds, self.healthy = [], [], seconds, 1

    async def count(self):
        return self.healthy

    async def __call__(self, batch):
        self.batches.append([asked.request.adapter for asked in batch])
        await asyncio.sleep(self.seconds)
        if self.fails:
            raise self.fails.pop()
        answers = [
            Refusal(422, "it does not fit") if asked.request.prompt == "unfit"
            else ApiAnswer(f"{asked.request.adapter} {asked.seed}".encode(), asked.seed, ("n\xe9",))
            for asked in batch
        ]  # fmt: skip
        return Reply(answers, len(batch))


def client_of(folder, workers, token=TOKEN, timeout=60.0, **queue):
    service = Service(
        Catalogue([folder]), workers, workers.count, timeout, **({"window": 1.0} | queue)
    )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    transport = httpx.ASGITransport(make_app(service, token))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)


async def post(client, **values):
    return await client.post("/v1/images", json={"prompt": "a dog", **values})


def test_requests_of_many_adapters_share_a_batch_and_each_gets_its_own(folder):
    workers = Workers()

    async def ask():
        async with client_of(folder, workers) as client:
            values = [{"adapter": name, "seed": seed} for seed, name in enumerate(
                ["dog", "cat", None, "dog", "v", "../v", "torn"])]  # fmt: skip
            values += [{"seed": 7, "steps": 3}, {"prompt": "unfit"}]
            return await asyncio.gather(*(post(client, **value) for value in values))

    *good, other, unknown, torn, steps, unfit = run(ask())
    found = [(answer.content, answer.headers["X-Seed"]) for answer in (*good, other, steps)]
    assert found == [
        (b"dog 0", "0"), (b"cat 1", "1"), (b"None 2", "2"), (b"dog 3", "3"), (b"v 4", "4"),
        (b"None 7", "7"),
    ]  # fmt: skip
    assert json.loads(good[0].headers["X-Notes"]) == ["né"]
    assert good[0].headers["Content-Type"] == "image/png"
    # Its own noise schedule, and other steps, are batches of their own.
    assert sorted(map(len, workers.batches)) == [1, 1, 5]
    assert ["v"] in workers.batches
    assert (unknown.status_code, torn.status_code, unfit.status_code) == (404, 422, 422)
    assert "no adapter '../v'; see /v1/adapters" in unknown.json()["detail"]
    assert "torn.safetensors" in torn.json()["detail"]
    assert unfit.json() == {"detail": "it does not fit"}


def test_overload_timeouts_and_dead_workers_have_their_statuses(folder):
    workers = Workers(seconds=10)

    async def ask():
        async with client_of(folder, workers, timeout=15.0, capacity=2, batch_size=1) as client:
            asked = [asyncio.ensure_future(post(client, seed=n)) for n in range(4)]
            answers = await asyncio.gather(*asked)
            await asyncio.sleep(10)
            workers.fails = [WorkerLostError("gone")] * 3
            workers.seconds = 1
            lost = await post(client)
            workers.fails = [WorkerLostError("gone")]
            return answers, lost, await post(client), (await client.get("/metrics")).text

    answers, lost, again, metrics = run(ask())
    assert [answer.status_code for answer in answers] == [200, 504, 504, 429]
    assert int(answers[3].headers["Retry-After"]) >= 1
    assert "no image within 15 s" in answers[1].json()["detail"]
    assert (lost.status_code, again.status_code) == (500, 200)
    for line in (
        'dora_requests_total{status="200"} 2.0', 'dora_requests_total{status="504"} 2.0',
        'dora_requests_total{status="429"} 1.0', "dora_workers_lost_total 4.0",
        "dora_queue_length 0.0", "dora_batch_size_count 2.0",
    ):  # fmt: skip
        assert line in metrics.splitlines(), metrics
    # Who had waited too long was not sampled for.
    assert sum(map(bool, workers.batches)) == 2 + 3 + 2


def test_readiness_is_that_of_the_replicas_now(folder):
    workers = Workers()

    async def ask():
        async with client_of(folder, workers, token=None) as client:
            found = []
            for workers.healthy in (1, 0, 2):
                metrics = (await client.get("/metrics")).text.splitlines()
                codes = [(await client.get(path)).status_code for path in ("/health", "/ready")]
                heads = [await client.head(path) for path in ("/health", "/ready")]
                assert [(one.status_code, one.content) for one in heads] == [
                    (code, b"") for code in codes
                ]
                found.append((*codes, f"dora_ready {codes[1] == 200:.1f}" in metrics))
            return found

    assert run(ask()) == [(200, 200, True), (200, 503, True), (200, 200, True)]


def valued(**values):
    return json.dumps({"prompt": "a dog", **values}).encode()


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (valued(prompt=""), "prompt: String should have at least 1 character"),
        (valued(steps=0), "steps: Input should be greater than or equal to 1"),
        (valued(width=65), "width: Input should be a multiple of 8"),
        (valued(scheduler="fast"), "scheduler: Value error, it must be one of ddim"),
        (valued(strength=9), "strength: Input should be less than or equal to 3"),
        *((valued(**{name: text}), f"{name}: Input should be a valid")
          for name, text in NUMBERS.items()),
        (valued(prompt="x" * 70000), "a request has a Content-Length, of at most 65536 bytes"),
        (b"", "the body: Field required"),
        (b"[]", "the body: Input should be a valid dictionary"),
        (b"prompt=a", "the body is not JSON: Expecting value, at character 0"),
        (b'{"prompt": "a",}', "the body is not JSON: Illegal trailing comma|the body is not JSON: "
                              "Expecting property name"),
        (b'{"prompt": "a", "stepz": 1}', r"there is no field stepz \(did you mean steps\?\)$"),
        (b'{"prompt": "a", "sampler": "x"}', r"there is no field sampler \(did you mean scheduler"),
        (b'{"prompt": "a", "wombat": 1}', "there is no field wombat$"),
        (b'{"prompt": "a", "scheduler": "eular"}', r"scheduler: .*\(did you mean euler\?\)$"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_one_line(folder, body, line):
    async def ask():
        async with client_of(folder, Workers()) as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/images", content=body, headers=headers)

    answer = run(ask())
    assert answer.status_code == (413 if "Length" in line else 422)
    assert re.match(line, answer.json()["detail"])


def test_without_the_token_nothing_is_told(folder):
    workers = Workers()

    async def ask():
        async with client_of(folder, workers) as client:
            paths = ("/v1/adapters", "/metrics", "/health", "/openapi.json", "/v1/../metrics")
            del client.headers["Authorization"]
            codes = [(await client.get(path)).status_code for path in paths]
            for header in ("", "Bearer", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \xff"):
                given = {"Authorization": header.encode("latin-1")}
                answer = await client.post("/v1/images", json={"prompt": "a"}, headers=given)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            for scheme in ("bearer", "BEARER", "Bearer "):
                given = {"Authorization": f"{scheme} {TOKEN}"}
                listed = await client.get("/v1/adapters", headers=given)
            return codes, listed.json()

    codes, listed = run(ask())
    assert codes == [401, 401, 200, 200, 401]
    assert workers.batches == []
    assert [each["name"] for each in listed] == ["cat", "dog", "torn", "v"]
    assert listed[1] == {"name": "dog", "trigger": "sks dog", "family": "sd1", "problem": None}
    assert "torn.safetensors" in listed[2]["problem"]


def test_without_a_token_another_name_of_this_machine_is_refused(folder):
    async def ask(host):
        async with client_of(folder, Workers(), token=None) as client:
            return (await client.get("/v1/adapters", headers={"Host": host})).status_code

    good = ("localhost:8000", "LOCALHOST", "127.0.0.1", "127.0.0.2:1", "[::1]", "[::1]:8000")
    assert {run(ask(host)) for host in good} == {200}
    bad = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
           "192.168.1.7", "[::2]", "0.0.0.0", "[::]:8000", "", "a b", "localhost:x")  # fmt: skip
    assert {run(ask(host)) for host in bad} == {400}


def test_each_request_is_a_line_of_the_log_without_prompts_and_tokens(folder, caplog):
    workers = Workers()

    async def ask():
        async with client_of(folder, workers) as client:
            for path in ("/health", "/ready", "/metrics", "/v1/adapters", "/a%0Ab?secret=1"):
                await client.get(path)
            await post(client, adapter="dog", prompt="secret")
            await post(client, adapter="no\none")
            await client.post("/v1/images", headers={"Authorization": "Bearer secret-secret"})
            workers.healthy = 0
            await client.get("/ready")

    with caplog.at_level("INFO", "dora_diffusion.cluster.serving"):
        run(ask())
    assert "secret" not in caplog.text
    messages = serving_log(caplog)
    assert not any("\n" in message for message in messages)
    lines = [json.loads(message) for message in messages]
    assert [(line["request"], line["status"], line.get("adapter")) for line in lines] == [
        ("GET /v1/adapters", 200, None), ("GET /a\nb", 404, None),
        ("POST /v1/images", 200, "dog"), ("POST /v1/images", 404, "no\none"),
        ("POST /v1/images", 401, None), ("GET /ready", 503, None),
    ]  # fmt: skip
    assert {*lines[0]} == {"time", "client", "request", "status", "seconds"}


def test_an_adapter_that_no_request_can_use_has_its_problem_and_is_not_counted(
    folder, sd1_folder, random_adapter, monkeypatch
):
    """Checked against the base as for a request, and each version of a file once."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    layers = random_adapter(sd1_folder, components=["unet"], every=9)
    good = write_adapter(folder / "good.safetensors", AdapterFile(layers, AdapterMetadata("sd1")))
    first, last = min(layers), max(layers)
    other = {"transformer.layers.0.attention.to_q": layers[first]}
    strange = {first: layers[last]}
    assert layers[first].weight_shape != layers[last].weight_shape
    for name, family, part in (("other", "z-image", other), ("strange", "sd1", strange)):
        write_adapter(folder / f"{name}.safetensors", AdapterFile(part, AdapterMetadata(family)))
    (folder / "torn.safetensors").write_bytes(good.read_bytes()[:-9])
    (folder / "new").mkdir()
    (folder / "new" / "good.safetensors").write_bytes(good.read_bytes())
    read = []
    monkeypatch.setattr(
        "dora_diffusion.formats.adapter.file.read_adapter",
        lambda path, base: read.append(path) or read_adapter(path, base),
    )
    catalogue = Catalogue([folder, folder / "new"])
    with open_model(sd1_folder) as base:
        service = Service(catalogue, Workers(), None, 1.0, base)
        assert service.counted_adapters() == (
            "2 adapters (4 more with a problem: see /v1/adapters)"
        )
        listed = [(row["name"], row["problem"]) for row in service.adapters()]
        assert len(read) == len(set(read))
        os.utime(good, ns=(1, 1))
        assert service.counted_adapters()[:10] == "2 adapters"
        assert read.count(good) == 2
    assert listed[0] == ("good", None)
    assert "was made for Z-Image" in dict(listed)["other"]
    assert first in dict(listed)["strange"]
    assert "torn.safetensors" in dict(listed)["torn"]
    assert listed[-1][1].startswith("there is another good in")
    assert str(folder) not in str([problem for _, problem in listed])
    alone = Service(Catalogue([folder]), Workers(), None, 1.0)
    assert alone.counted_adapters() == "4 adapters (1 more with a problem: see /v1/adapters)"


def test_a_defect_is_told_in_the_log_and_not_to_who_asks(folder, caplog):
    class Broken(Workers):
        async def __call__(self, batch):
            return Reply([Refusal(500, "unexpected", defect="Traceback: here") for _ in batch], 0)

    async def ask():
        async with client_of(folder, Broken()) as client:
            return (await post(client)).json()

    assert run(ask()) == {"detail": "unexpected"}
    assert "Traceback: here" in caplog.text


def test_adapters_may_come_go_and_break_while_clients_list_and_ask(folder, monkeypatch):
    """Each look at a file may find it gone, locked or broken, and the others are answered."""
    read, turns = Catalogue.metadata, itertools.count()
    troubles = [
        FileNotFoundError(2, "No such file", "x"), PermissionError(13, "Permission denied", "x"),
        OSError(5, "Input/output error", "x"), ValueError("torn"), KeyError("a defect"),
    ]  # fmt: skip

    def trouble(file):
        if file.stem == "dog":
            raise troubles[next(turns) % len(troubles)]
        return read(file)

    monkeypatch.setattr(Catalogue, "metadata", staticmethod(trouble))

    async def ask():
        async with client_of(folder, Workers()) as client:
            listed = [(await client.get("/v1/adapters")).json() for _ in troubles]
            codes = [(await post(client, adapter="dog")).status_code for _ in troubles]
            codes += [(await post(client, adapter="cat")).status_code]
            return listed, codes

    listed, codes = run(ask())
    assert codes == [404, 422, 422, 422, 500, 200]
    problems = [{row["name"]: row["problem"] for row in rows} for rows in listed]
    assert all(rows["cat"] is None and rows["v"] is None for rows in problems)
    assert "dog" not in problems[0]
    found = [rows["dog"] for rows in problems[1:]]
    assert found[:3] == ["x: Permission denied", "x: Input/output error", "torn"]
    assert "KeyError" in found[3]
    assert str(folder) not in str(problems)
