"""The HTTP API: the same checks, logins and limits as the pages, and a client over it."""

from __future__ import annotations

import errno
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from PIL import Image
from starlette.routing import Mount
from tests.studio.jobs.test_inputs import REFUSED

from dora_diffusion import generate_images
from dora_diffusion.config import PRESETS
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import is_photo
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.studio.app import api as app_api
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.settings import (
    ADVANCED,
    EMBEDDED,
    PROMPTS,
    SETTINGS,
    preset_values,
    setting_text,
)
from dora_diffusion.studio.app.views.request import UNSET
from dora_diffusion.studio.app.views.train import read_form
from dora_diffusion.studio.client import ROOT, ApiError, Client, RemotePromptFile
from dora_diffusion.studio.jobs import queue, records, tasks
from dora_diffusion.studio.jobs.inputs import list_prompt_files
from dora_diffusion.studio.jobs.queue import PERSON
from dora_diffusion.studio.jobs.store import UserError
from dora_diffusion.studio.jobs.subjects import read_subject
from tests.shallow import *  # noqa: F403
from tests.studio.jobs.helpers import make, perform, photo
from tests.studio.jobs.test_uploads import NO_PHOTOS, huge_png

PEOPLE = {"ann": "correct horse", "bob": "battery: staple"}


class Served:
    """An app's API without a port, and clients of it."""

    def __init__(self, launch: Launch) -> None:
        self.context = Context(launch)
        self.api = app_api.make_api(self.context)
        self.http = TestClient(FastAPI(routes=[Mount(ROOT, self.api)]), "http://localhost")
        self.ann, self.bob = (self.client(name) for name in PEOPLE)

    def client(self, name: str) -> Client:
        return Client("http://localhost", (name, PEOPLE[name]), http=self.http)

    @property
    def files(self) -> set[str]:
        root = self.context.workspace.root
        found = (path for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
        return {path.relative_to(root).as_posix() for path in found}

    def ask(self, method: str, address: str, **more: Any) -> Any:
        return self.http.request(
            method, f"{ROOT}/{address}", **{"auth": ("ann", PEOPLE["ann"]), **more}
        )


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    # Nothing here may start a worker.
    monkeypatch.setattr(queue.JobQueue, "tick", lambda self: None)
    logins = ",".join(f"{name}:{word}" for name, word in PEOPLE.items())
    return Served(Launch(runs_dir=tmp_path / "runs", auth=logins))


@pytest.fixture
def subject(served: Served, tmp_path: Path) -> str:
    files = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png", (80, 90))]
    return served.ann.upload("Rex", files, class_word="dog").id


# Who may ask


def routes(served: Served) -> Iterator[tuple[str, str]]:
    """Method and address of every route, with ids that do not exist."""
    for route in served.api.routes:
        assert isinstance(route, APIRoute)
        for method in route.methods:
            yield method, re.sub(r"{\w+}", "x", route.path_format.lstrip("/"))


def test_every_route_asks_for_the_login(served: Served) -> None:
    asked = list(routes(served))
    assert len(asked) > 18
    before = served.files
    for method, address in asked:
        for auth in (None, ("ann", ""), ("ann", PEOPLE["bob"]), ("", ""), ("eve", "correct horse")):
            answer = served.ask(method, address, auth=auth)
            assert answer.status_code == 401, (method, address, auth)
            assert answer.headers["WWW-Authenticate"] == "Basic"
        bearer = {"Authorization": "Bearer " + "YW5uOmNvcnJlY3QgaG9yc2U="}
        assert served.ask(method, address, auth=None, headers=bearer).status_code == 401
        assert served.ask(method, address).status_code in (200, 404, 422), (method, address)
    assert served.files == before


def test_without_logins_everybody_of_this_machine_may_ask(tmp_path: Path) -> None:
    served = Served(Launch(runs_dir=tmp_path / "runs"))
    assert served.ask("GET", "jobs", auth=None).json() == []


@pytest.mark.parametrize(
    "auth", ["ann:long enough,ann:other words", "ann:long enough,", ",", "a:b"]
)
def test_logins_that_are_none_are_refused(auth: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--auth must be NAME:PASSWORD.*each with another name"):
        Launch(runs_dir=tmp_path, auth=auth)


def test_every_route_is_described(served: Served) -> None:
    described = served.ask("GET", "openapi.json").json()["paths"]
    assert {
        (method.upper(), re.sub(r"{\w+}", "x", path.lstrip("/")))
        for path, methods in described.items()
        for method in methods
    } == set(routes(served))
    assert all(entry["description"] for way in described.values() for entry in way.values())


# Uploads


@pytest.mark.parametrize(("content", "name"), [*NO_PHOTOS, (b"PK\x03\x04" + b"\0" * 99, "a.zip")])
def test_what_is_no_photo_is_refused_and_nothing_is_left(
    content: bytes, name: str, served: Served, subject: str, tmp_path: Path
) -> None:
    before = served.files
    for address in (f"subjects/{subject}/photos/{name}", f"inputs/{name}"):
        answer = served.ask("PUT", address, content=content)
        assert (answer.status_code, name in answer.json()["detail"]) == (422, True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ApiError, match=re.escape(name)):
        served.ann.upload("Other", [tmp_path / name])
    assert served.files == before


def test_bombs_and_strips_are_refused(served: Served, subject: str, tmp_path: Path) -> None:
    before = served.files
    for file, words in (
        (huge_png(tmp_path / "bomb.png"), "megapixels"),
        (photo(tmp_path / "s.png", (600, 20)), "strip"),
    ):  # fmt: skip
        with pytest.raises(ApiError, match=words):
            served.ann.add_photos(subject, [file])
        with pytest.raises(ApiError, match=words):
            served.ann.upload_input(file)
    assert served.files == before


@pytest.mark.parametrize(
    "name",
    ["..%2F..%2Fjob.json", "%2e%2e", "%2e", "..", "..%5Ca.jpg", "C%3Aa.jpg", "..%5C..%5Ca.jpg%2F",
     "a%00.jpg", "a%0A.jpg", "..%2Fstyles.csv", "..%2Fwildcards%2Fa.txt", ".%2Fa.txt", "%2Fa.txt",
     "x" * 300 + ".jpg", "{outside}", "a%2Fb.jpg", "%1B%5B31m.jpg"],
)  # fmt: skip
def test_a_name_leads_nowhere(name: str, served: Served, subject: str, tmp_path: Path) -> None:
    before, content = served.files, photo(tmp_path / "c.jpg").read_bytes()
    # An absolute path, of this test: what is broken may delete it.
    (tmp_path / "own.txt").write_text("own", encoding="utf-8")
    name = name.format(outside=quote(str(tmp_path / "own.txt"), safe=""))
    outside = {path for path in tmp_path.rglob("*") if "runs" not in path.parts}
    (served.context.workspace.wildcards / "a.txt").write_text("red", encoding="utf-8")
    before |= {"wildcards/a.txt"}
    asked = [("PUT", f"{part}/{name}") for part in (f"subjects/{subject}/photos", "inputs")]
    asked += [(method, f"prompt-files/{n}") for n in (name, re.sub(r"jpg|json", "txt", name))
              for method in ("PUT", "DELETE")]  # fmt: skip
    for method, address in asked:
        more = {"content": content} if method == "PUT" else {}
        answer = served.ask(method, address, **more)
        assert answer.status_code in (404, 405, 422), answer.text
        assert "\x1b" not in answer.text
    assert served.files == before
    assert {path for path in tmp_path.rglob("*") if "runs" not in path.parts} == outside


def test_what_is_too_large_is_refused_before_it_is_read(
    served: Served, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_api, "MAX_BYTES", 2000)
    for method, address, most in (
        ("PUT", f"subjects/{subject}/photos/a.jpg", 2000), ("POST", "subjects", app_api.MOST_BYTES),
        ("POST", "trainings", app_api.MOST_BYTES), ("POST", "images", app_api.MOST_BYTES),
    ):  # fmt: skip
        for content in (b"x" * (most + 1), iter([b"x"])):  # the second has no length
            answer = served.ask(method, address, content=content)
            assert (answer.status_code, str(most) in answer.json()["detail"]) == (413, True)
        assert served.ask(method, address, content=b"x" * most).status_code == 422


def test_the_upload_s_limits_are_the_page_s(
    served: Served, subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_diffusion.studio.jobs.uploads.MAX_PHOTOS", 2)
    with pytest.raises(ApiError, match="at most 2"):
        served.ann.add_photos(subject, [photo(tmp_path / "c.jpg")])


PATHS = [
    (name, parameter.name)
    for name, method in inspect.getmembers(Client, inspect.isfunction)
    for parameter in inspect.signature(method).parameters.values()
    if "Path" in str(parameter.annotation) and not name.startswith("_")
]


def test_every_method_with_a_path_is_looked_at() -> None:
    assert {name for name, _ in PATHS} >= {"upload", "upload_input", "fetch_image"}
    assert {parameter for _, parameter in PATHS} == {"file", "files", "output"}


@pytest.mark.parametrize(("method", "parameter"), PATHS)
def test_a_path_that_cannot_be_used_is_refused_before_anything_is_sent(
    method: str, parameter: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = photo(tmp_path / "good.jpg")
    asked = list[Any]()
    monkeypatch.setattr(served.http, "request", lambda *call, **more: asked.append(call))
    names = [*inspect.signature(getattr(Client, method)).parameters][1:]
    others = ["x" for name in names[: names.index(parameter)]]

    def refused(path: Any) -> str:
        with pytest.raises(UserError) as error:
            getattr(served.ann, method)(*others, path)
        assert not asked
        return str(error.value)

    wrong = [tmp_path / "gone.jpg", str(tmp_path), good / "below.jpg"]
    if parameter == "output":
        del wrong[0]
    if parameter == "files":
        wrong += [[good, path] for path in wrong]
        assert refused([]) == "no files were given"
    for path in wrong:
        named = path[-1] if isinstance(path, list) else path
        line = refused(path)
        assert str(good if parameter == "output" and named == wrong[-1] else named) in line
        assert "Errno" not in line
        assert "folder" in line or "does not exist" in line or "directory" in line

    def forbid(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    if parameter != "output":
        monkeypatch.setattr(Path, "open", forbid)
        assert refused(good) == f"{good}: Permission denied"
    assert {*tmp_path.iterdir()} == {good, tmp_path / "runs"}


def test_one_file_may_be_given_alone(served: Served, tmp_path: Path) -> None:
    file = photo(tmp_path / "a.jpg")
    for one in (file, str(file), [file]):
        assert len(served.ann.upload("Rex", one).photos) == 1  # type: ignore[arg-type]


def test_captions_find_their_photos_and_what_is_refused_is_told(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_api, "MAX_BYTES", 100_000)
    (tmp_path / "large.jpg").write_bytes(b"x" * 100_001)
    (tmp_path / "a b.txt").write_text("a sks dog", encoding="utf-8")
    (tmp_path / "none.txt").write_text("a cat", encoding="utf-8")
    names = ("none.txt", "a b.txt", "large.jpg")
    files = [*(tmp_path / name for name in names), photo(tmp_path / "a b.jpg")]
    made = served.ann.upload("Rex", files, class_word="dog", token="zwx")
    assert (made.title, made.class_word, made.token) == ("Rex", "dog", "zwx")
    assert [line.partition(":")[0] for line in made.refused] == ["large.jpg", "none.txt"]
    stored = read_subject(served.context.workspace, made.id)
    assert stored.photos[0].with_suffix(".txt").read_text(encoding="utf-8") == "a sks dog\n"
    assert [each.id for each in served.bob.subjects()] == [made.id]
    served.bob.delete_subject(made.id)
    assert served.ann.subjects() == []


# Styles and wildcards


def test_wildcards_and_styles_are_kept_listed_drawn_and_deleted(
    served: Served, sd1_folder: Path, tmp_path: Path
) -> None:
    ann, workspace = served.ann, served.context.workspace
    assert ann.prompt_files() == []
    for name, text in (
        ("colours.TXT", "# of it\r\nteal\n"),
        ("my styles.csv", "name,prompt,negative_prompt\nink,{prompt} in ink,photo\noil,oil,\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    colours = ann.upload_prompt_file(tmp_path / "colours.TXT")
    styles = ann.upload_prompt_file(str(tmp_path / "my styles.csv"))
    assert colours == RemotePromptFile("colours.txt", ("__colours__",))
    assert styles == RemotePromptFile("styles.csv", ("ink", "oil"))
    (workspace.wildcards / "sea").mkdir()
    (workspace.wildcards / "sea" / "fish.txt").write_text("cod", encoding="utf-8")
    fish = RemotePromptFile("sea/fish.txt", ("__sea/fish__",))
    # The same files in the page.
    assert served.bob.prompt_files() == [styles, colours, fish] == list_prompt_files(workspace)
    settings = {"wildcards": True, "style": ["ink"], "steps": 1, "seed": 1, "negative_prompt": "x",
                "width": 32, "height": 32, "num_images": 1}  # fmt: skip
    prompt = "a __colours__ mug, __sea/fish__"
    (image,) = ann.generate(f"base/{sd1_folder}", prompt, settings)
    said = parse_parameters(image.parameters)
    assert (said["Prompt"], said["Negative prompt"]) == ("a teal mug, cod in ink", "x, photo")
    for name in ("sea/fish.txt", "styles.csv"):
        served.bob.delete_prompt_file(name)
        with pytest.raises(ApiError, match="this file no longer exists") as caught:
            ann.delete_prompt_file(name)
        assert caught.value.status == 404
    assert ann.prompt_files() == [colours]
    for more in ({}, {"style": []}):
        with pytest.raises(ApiError, match=r"the wildcard __sea/fish__ has no file"):
            ann.generate(f"base/{sd1_folder}", prompt, {**settings, "style": [], **more})


def test_no_link_is_followed_and_what_no_prompt_can_name_is_not_listed(
    served: Served, tmp_path: Path
) -> None:
    workspace, outside = served.context.workspace, tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret", encoding="utf-8")
    (workspace.wildcards / "folder").symlink_to(outside)
    (workspace.wildcards / "link.txt").symlink_to(outside / "secret.txt")
    for name in ("a\x1b.txt", "\udcff.txt", "_.txt", "<b>.txt"):
        (workspace.wildcards / name).write_text("red", encoding="utf-8")
    workspace.styles.write_bytes(b"\xff")
    (tmp_path / "link.txt").write_text("blue", encoding="utf-8")
    styles, link = served.ann.prompt_files()
    assert (styles.names, styles.problem) == (
        (), "styles styles.csv is not UTF-8 text; save it as UTF-8"
    )  # fmt: skip
    assert link.name == "link.txt"
    assert served.ann.upload_prompt_file(tmp_path / "link.txt") == link
    assert (workspace.wildcards / "link.txt").read_text(encoding="utf-8") == "blue"
    (workspace.wildcards / "link.txt").unlink()
    (workspace.wildcards / "link.txt").symlink_to(outside / "secret.txt")
    for name in ("link.txt", "styles.csv"):
        served.ann.delete_prompt_file(name)
    with pytest.raises(ApiError, match="no longer exists"):
        served.ann.delete_prompt_file("folder/secret.txt")
    assert served.ann.prompt_files() == []
    assert (outside / "secret.txt").read_text(encoding="utf-8") == "secret"


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_no_prompt_can_use_is_not_kept(
    name: str, content: bytes, message: str, served: Served
) -> None:
    workspace = served.context.workspace
    workspace.styles.write_text("name,prompt\nink,ink\n", encoding="utf-8")
    (workspace.wildcards / "c.txt").write_text("green", encoding="utf-8")
    before = {name: (workspace.root / name).read_bytes() for name in served.files}
    answer = served.ask("PUT", f"prompt-files/{quote(name, safe='')}", content=content)
    line = answer.json()["detail"]
    assert answer.status_code == 422
    assert re.search(message, line) or ("\x1b" in name and "is not the name of a file" in line)
    assert str(workspace.root) not in line
    assert {name: (workspace.root / name).read_bytes() for name in served.files} == before


# Trainings


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_page_s(preset: str, served: Served, tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a.jpg")]
    subject = served.ann.upload("Rex", photos, class_word="dog", token="<sks>").id
    context, is_slider = served.context, preset == "slider"
    prompts = {"target": "a mug", "positive": "a large mug", "negative": "a small mug"}
    values = preset_values(preset, EMBEDDED, context.device()) | {"rank": 3, "seed": 9}
    texts = [setting_text(values[name]) for name in ADVANCED]
    lines = [prompts.get(name, "") for name in PROMPTS] if is_slider else []
    wanted, _ = read_form(context, subject, EMBEDDED, "<sks>", "dog", "", *texts, (), *lines)
    given = {"rank": 3, "seed": "9", **({n: [p] for n, p in prompts.items()} if is_slider else {})}
    job = served.ann.train([] if is_slider else [subject], given, preset, "One")
    assert (job.title, job.state, job.position) == ("One", "waiting", 1)
    got = context.job(job.id).settings
    assert (got["rank"], got["seed"]) == (3, 9)
    own = {"output_dir", "instance_data_dir"}  # of the job
    assert {name for name, value in wanted.to_dict().items() if got[name] != value} <= own


def test_every_setting_of_the_page_can_be_given_and_no_other(served: Served, subject: str) -> None:
    before = served.files
    for name in SETTINGS:
        is_offered = name in (
            *ADVANCED,
            *PROMPTS,
            "pretrained_model_name_or_path",
            "validation_prompt",
        )
        for value in ({"a": {"b": 1}}, [["x"]]):
            with pytest.raises(ApiError) as caught:
                served.ann.train([subject], {name: value})
            assert (caught.value.status, name in str(caught.value)) == (422, True), name
            assert ("set by the app itself" in str(caught.value)) != is_offered, name
    with pytest.raises(ApiError, match=r"rnak is not a setting \(did you mean rank\?\)"):
        served.ann.train([subject], {"rnak": 3})
    with pytest.raises(ApiError, match="there is no preset 'x'"):
        served.ann.train([subject], preset="x")
    with pytest.raises(ApiError, match="subject no longer exists") as caught:
        served.ann.train(["../../x"])
    assert caught.value.status == 404
    answer = served.ask("POST", "trainings", json={"subject": [subject]})
    assert (answer.status_code, answer.json()["detail"][:9]) == (422, "subject: ")
    assert served.files == before


def test_a_shared_app_loads_the_listed_models_alone(tmp_path: Path, sd1_folder: Path) -> None:
    served = Served(Launch(runs_dir=tmp_path / "runs", host="0.0.0.0", auth="ann:correct horse"))
    made = served.ann.upload("Rex", [photo(tmp_path / "a.jpg")], class_word="dog")
    model = {"pretrained_model_name_or_path": str(sd1_folder)}
    for refused in (model, {"model_config": str(sd1_folder)}):
        with pytest.raises(ApiError, match="this app is shared, and"):
            served.ann.train([made.id], refused)
    with pytest.raises(ApiError, match="this app is shared, and offers only"):
        served.ann.generate(f"base/{sd1_folder}", "a mug")


# The queue


def test_each_sees_whose_turn_it_is(
    served: Served, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = served.ann.train([subject], {"seed": 1}, name="first")
    second = served.bob.train([subject], {"seed": 2}, name="second")
    third = served.ann.train([subject], {"seed": 3}, name="third")
    assert [job.id for job in served.bob.queue()] == [first.id, second.id, third.id]
    told = [(job.position, job.owner, job.is_mine) for job in served.bob.queue()]
    assert told == [(1, "ann", False), (2, "bob", True), (3, "ann", False)]
    with pytest.raises(ApiError, match="the same photos and settings is number 2"):
        served.ann.train([subject], {"seed": 2})
    token = PERSON.set("bob")
    page = re.findall(r"<li>.*?</li>", html.queue_list(served.context.jobs(fresh=True)))
    assert [re.search(r"number \d · (ann|you)", row)[0] for row in page] == [  # type: ignore[index]
        "number 3 · ann", "number 2 · you", "number 1 · ann"
    ]  # fmt: skip
    PERSON.reset(token)
    assert served.bob.stop(first.id).state == "stopped"
    assert [job.position for job in served.ann.queue()] == [1, 2]
    assert served.ann.resume(first.id).position == 3
    served.ann.delete(second.id)
    assert [job.id for job in served.ann.jobs()] == [third.id, first.id]
    with pytest.raises(ApiError, match="this run no longer exists") as caught:
        served.ann.job(second.id)
    assert caught.value.status == 404
    monkeypatch.setattr(queue, "_MOST_JOBS_WAITING", 2)
    with pytest.raises(ApiError, match="the queue is full") as caught:
        served.ann.train([subject])
    assert caught.value.status == 429


def test_who_waits_for_a_job_that_fails_is_told_why(served: Served) -> None:
    folder = make(served.context.workspace, "sks mug")
    (folder / records.LOG).write_text("error: out of luck\n", encoding="utf-8")
    records.write_result(folder, records.JobResult(1))
    seen = list[str]()
    with pytest.raises(ApiError, match="sks mug is failed: out of luck"):
        served.ann.wait(folder.name, lambda job: seen.append(job.state))
    assert seen == ["failed"]
    assert served.ann.log(folder.name) == "error: out of luck"


# From photos to an image


def test_what_is_uploaded_trained_and_generated_is_what_the_library_makes(
    served: Served, subject: str, sd1_folder: Path, tmp_path: Path
) -> None:
    ann, workspace = served.ann, served.context.workspace
    run = ann.train([subject], {
        "pretrained_model_name_or_path": str(sd1_folder), "resolution": 32, "max_train_steps": 2,
        "rank": 2, "conv_rank": 2, "learning_rate": 1e-2, "num_validation_images": 1,
        "validation_prompt": ["a photo of a {subject}"], "validation_inference_steps": 2,
        "checkpointing_steps": 1, "with_prior_preservation": False, "validation_steps": None,
    })  # fmt: skip
    with pytest.raises(ApiError, match="no adapter yet"):
        ann.fetch_adapter(run.id, tmp_path / "none")
    perform(workspace, run.id)
    run = ann.wait(run.id)
    assert (run.state, run.step, run.total, run.has_adapter) == ("done", 2, 2, True)
    assert run.trigger == "sks dog"
    adapter = ann.fetch_adapter(run.id, tmp_path / "mine.safetensors")
    assert (
        adapter.read_bytes() == next((workspace.root / run.id).glob("*.safetensors")).read_bytes()
    )
    first = ann.fetch_adapter(run.id, tmp_path / "first.safetensors", run.checkpoints[0])
    assert first.read_bytes() != adapter.read_bytes()
    sample = ann.fetch_sample(run.id, run.samples[0], tmp_path / "sample.png")
    assert is_photo(sample)
    for model, file, strength in ((run.id, adapter, 1.0), (f"{run.id}/checkpoint-1", first, -0.5)):
        made = ann.generate(model, "a photo of a {subject} at night", {
            "seed": 7, "num_images": 2, "steps": 3, "guidance_scale": 2, "width": 40,
            "height": 32, "strength": strength, "negative_prompt": "cat",
        })  # fmt: skip
        assert [image.seed for image in made] == [7, 8]
        components, _ = load_adapted(sd1_folder, file, strength=strength)
        settings = SamplingSettings(
            steps=3, guidance_scale=2, width=40, height=32, negative_prompt="cat"
        )
        wanted = generate_images(components, "a photo of a sks dog at night", [7, 8], settings)
        for image, own in zip(made, wanted, strict=True):
            fetched = ann.fetch_image(image.name, tmp_path / image.name)
            with Image.open(fetched) as opened:
                assert opened.tobytes() == own.tobytes()
                assert opened.text["parameters"] == image.parameters  # type: ignore[attr-defined]
    start = {"seed": 7, "steps": 4, "image": ann.upload_input(sample), "denoise": 0.5}
    (image,) = ann.generate(run.id, "a photo of a {subject}", start)
    settings = SamplingSettings(
        steps=4, image=open_photo(sample), denoise=0.5, guidance_scale=run_guidance(served, run.id)
    )
    components, _ = load_adapted(sd1_folder, adapter)
    [wanted] = generate_images(components, "a photo of a sks dog", [7], settings)
    with Image.open(ann.fetch_image(image.name, tmp_path / image.name)) as opened:
        assert opened.tobytes() == wanted.tobytes()
    with pytest.raises(ApiError, match="has made no file"):
        ann.fetch_output(run.id, tmp_path / "none")
    conversion = ann.convert(run.id, "kohya")
    perform(workspace, conversion.id)
    output = ann.fetch_output(conversion.id, tmp_path / "kohya.safetensors")
    assert read_adapter(output).layers.keys() == read_adapter(adapter).layers.keys()
    assert not (tmp_path / "none").exists()


def run_guidance(served: Served, run: str) -> float:
    return float(served.context.job(run).settings["validation_guidance_scale"])


def test_settings_of_images_are_checked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, words in (
        ({"output": "x"}, "output is not a setting of images"),
        ({"stesp": 3}, r"stesp is not a setting of images \(did you mean steps\?\)"),
        *(({name: {"a": [1]}}, name) for name in UNSET if name != "prompt"),
        ({"steps": 500}, "steps is 500; it must be between 1 and 200"),
        ({"width": 4096}, "width is 4096; it must be between 16 and 2048"),
        ({"num_images": 17}, "images is 17"),
        ({"style": ["ink"]}, "cannot read styles"),
        ({"style": ["ink"], "wildcards": "perhaps"}, "wildcards is 'perhaps'"),
    ):  # fmt: skip
        with pytest.raises(ApiError, match=words) as caught:
            served.ann.generate(f"base/{EMBEDDED}", "a mug", settings)
        assert caught.value.status == 422
    with pytest.raises(ApiError, match="this run no longer exists"):
        served.ann.generate("../x", "a mug")
    with pytest.raises(ApiError, match="write a prompt"):
        served.ann.generate(f"base/{EMBEDDED}", " ")
    assert served.files == set()


def test_a_crowd_that_waits_for_images_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_api, "MOST_WAITING", 0)
    served = Served(Launch(runs_dir=tmp_path / "runs", auth="ann:correct horse"))
    with pytest.raises(ApiError, match="wait already; try again later") as caught:
        served.ann.generate(f"base/{EMBEDDED}", "a mug")
    assert caught.value.status == 429


@pytest.mark.parametrize("name", ["..%2Fjob.json", "%2e%2e%2f", "link.png", "inputs", ".hidden"])
def test_files_outside_are_not_given_out(name: str, served: Served, tmp_path: Path) -> None:
    images = served.context.workspace.images
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (images / "link.png").symlink_to(tmp_path / "secret")
    (images / "inputs").mkdir(exist_ok=True)
    job = make(served.context.workspace)
    for address in (f"images/{name}", f"jobs/{job.name}/samples/{name}"):
        answer = served.ask("GET", address)
        assert (answer.status_code, "secret" in answer.text) == (404, False)


# What is no request

# JSON that no field is, or none should be, and which other languages write.
WRONG = [
    "NaN",
    "-Infinity",
    f"1{'0' * 400}",
    '"a\\u0000b\\u001b[31m"',
    '"\\ud800"',
    "-1",
    "[NaN]",
    "true",
]
KINDS = {"string": '"', "array": "[", "object": "{"}
BODIES = ["", "{", "[]", "null", "NaN", "\0", "[" * 10**5, "9" * 5000, '{"a\\u0000\\nb": 1}']
BODIES += ['{"\\u001b[31m": {}}', '{"settings": {"\\u001b[31m": 1}}', f'{{"{"x" * 5000}": 1}}']


@pytest.fixture
def refusing(
    served: Served, subject: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, str | None], str]]:
    """Asks what must be refused by one line: method, address and JSON. Nothing may change."""

    def begin(*args: Any, **options: Any) -> None:
        raise UserError("it could begin")

    monkeypatch.setattr(served.context.generator, "make", begin)
    monkeypatch.setattr(tasks, "start_training", begin)
    monkeypatch.setattr(tasks, "start_conversion", begin)

    def tree() -> dict[str, bytes]:
        root = served.context.workspace.root
        files = (path for path in root.rglob("*") if path.name[:1] != ".")
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}

    def ask(method: str, address: str, body: str | None = None) -> str:
        kind = {"Content-Type": "application/json"}
        answer = served.ask(method, address, content=(body or "").encode(), headers=kind)
        asked = (method, address[:99], body and body[:99])
        assert 400 <= answer.status_code < 500, asked
        line = answer.json()["detail"]
        assert 0 < len(line) <= 1000, asked
        assert line.isprintable(), asked
        assert "this is a bug" not in line, asked
        return str(line)

    make(served.context.workspace)
    served.context.jobs(fresh=True)
    before = tree()
    yield ask
    assert tree() == before


def test_no_field_of_another_type_is_more_than_a_line(
    served: Served, subject: str, refusing: Callable[[str, str, str | None], str]
) -> None:
    (job,) = served.ann.jobs()
    good = {"model": f"base/{EMBEDDED}", "prompt": "a mug", "title": "", "subjects": [subject],
            "program": "no program"}  # fmt: skip
    described = served.api.openapi()
    asked = 0
    for path, methods in described["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if not content:
            continue
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = described["components"]["schemas"][name]["properties"]
        address = path.lstrip("/").format(job=job.id)
        for field, kind in fields.items():
            others = {one: good[one] for one in fields if one in good and one != field}
            for wrong in (*WRONG, "{}", "[]", "null", '""', "[null]"):
                if not wrong.startswith(KINDS[kind["type"]]) or wrong == "[null]":
                    start = json.dumps(others)[:-1] + (", " if others else "")
                    assert field in refusing("POST", address, f'{start}"{field}": {wrong}}}')
                    asked += 1
        for body in BODIES:
            refusing("POST", address, body)
    assert asked > 100


def test_no_value_of_a_setting_is_more_than_a_line(
    subject: str, refusing: Callable[[str, str, str | None], str]
) -> None:
    # Lists and objects are those of `test_every_setting_of_the_page_can_be_given_and_no_other`.
    of_runs = [name for name in ADVANCED if SETTINGS[name].kind in (int, float)]
    for start, address, names in (
        (f'"model": "base/{EMBEDDED}", "prompt": "a mug"', "images", [*UNSET]),
        (f'"subjects": ["{subject}"]', "trainings", of_runs),
    ):
        for at, name in enumerate(names):  # each with another value
            wrong = WRONG[at % len(WRONG)]
            refusing("POST", address, f'{{{start}, "settings": {{"{name}": {wrong}}}}}')


def test_no_path_leads_to_more_than_a_line(
    served: Served, subject: str, refusing: Callable[[str, str, str | None], str]
) -> None:
    (job,) = served.ann.jobs()
    good = {"subject": subject, "job": job.id, "name": "a.txt"}
    for route in served.api.routes:
        assert isinstance(route, APIRoute)
        for parameter in re.findall(r"{(\w+)}", route.path_format):
            for wrong in ("%2e%2e", "a%00", "%1B%5B31m", "%ff", "x" * 5000, "..%2fjob.json"):
                address = route.path_format.lstrip("/").format(**{**good, parameter: wrong})
                for method in route.methods:
                    refusing(method, address, "{}" if method == "POST" else None)
    for wrong in ("..", "a%00", "%1B%5B31m", "x" * 5000):
        refusing("GET", f"jobs/{job.id}/adapter?checkpoint={wrong}", None)
