"""The app's functions in Gradio's API: the checks, logins and limits of the page."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, AuthenticationError
from PIL import Image

from dora_diffusion import generate_images
from dora_diffusion.config import PRESETS
from dora_diffusion.data.images import open_photo
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.studio.app import api
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.launch import Launch
from dora_diffusion.studio.app.serve import start
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
from dora_diffusion.studio.jobs import queue, records, uploads
from dora_diffusion.studio.jobs.queue import JobQueue, delete_job
from dora_diffusion.studio.jobs.subjects import add_photos, keep_words, new_subject, read_subject
from tests.shallow import *  # noqa: F403
from tests.studio.jobs.helpers import make, perform, photo
from tests.studio.jobs.test_uploads import NO_PHOTOS, huge_png
from tools.pages import DOCS, Page

PAGE = Page(DOCS / "howto" / "remote.md")
PEOPLE = dict(login.split(":") for login in re.findall(r"\w+:[\w-]+(?=[,\n])", PAGE.blocks[0].text))
MODEL = f"base/{EMBEDDED}"
# What the page shows, and what runs in its place to save time.
SHORTER = {
    "[subject], {": "[subject], {'with_prior_preservation': False, ",
    "{**prompts, ": "{**prompts, 'num_class_images': 3, ",
    '"max_train_steps": 200': '"max_train_steps": 2, "num_validation_images": 0',
    '"seed": 7': '"seed": 7, "steps": 2',
    '"steps": 20': '"steps": 2',
}


class Served:
    """A running app whose queue starts nothing, and a client of each of its users."""

    def __init__(self, folder: Path) -> None:
        logins = ",".join(map(":".join, PEOPLE.items()))
        launch = Launch(runs_dir=folder / "runs", port=0, auth=logins)
        self.context: Context
        self.context, self.blocks, self.url = start(launch)
        self.context.queue.close()
        self.ann, self.bob = (
            Client(self.url, auth=login, verbose=False, download_files=str(folder / login[0]))
            for login in PEOPLE.items()
        )

    @property
    def files(self) -> set[str]:
        """Files of the runs folder, besides Gradio's uploads."""
        root = self.context.workspace.root
        paths = (path for path in root.rglob("*") if path.is_file() and path.name[0] != ".")
        return {str(path) for path in paths if self.context.workspace.cache not in path.parents}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobQueue, "tick", lambda self: None)  # Nothing here may start a worker.
        one = Served(tmp_path_factory.mktemp("served"))
        yield one
        one.blocks.close(verbose=False)


@pytest.fixture
def subject(served: Served, tmp_path: Path) -> str:
    subject = new_subject(served.context.workspace, "Rex", "dog")
    files = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png", (80, 90))]
    add_photos(served.context.workspace, subject, files)
    return subject


@pytest.fixture(autouse=True)
def empty_queue(served: Served) -> None:
    for folder in served.context.workspace.job_folders:
        delete_job(served.context.workspace, folder.name)
    served.context.jobs(fresh=True)


def refused(client: Client, name: str, *values: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(AppError) as error:
        client.predict(*values, api_name=f"/{name}")
    line = str(error.value)
    assert line.isprintable()
    assert len(line) <= 1000
    assert "this is a bug" not in line
    return line


def test_without_the_login_nothing_is_called(served: Served) -> None:
    with pytest.raises(AuthenticationError, match="credentials were not provided"):
        Client(served.url, verbose=False)
    with pytest.raises(ValueError, match="Could not login"):
        Client(served.url, auth=("ann", PEOPLE["bob"]), verbose=False)
    names = served.ann.view_api(return_format="dict")["named_endpoints"]
    assert [*names] == ["/upload", "/train", "/wait", "/generate", "/fetch"]
    for name in names:
        address = f"{served.url}gradio_api/call{name}"
        assert httpx.post(address, json={"data": []}).status_code == 401


def test_blocks_of_the_page_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upload, train, wait, fetch and generate as the page shows, on the embedded model."""
    workspace = served.context.workspace

    def train_now(jobs: JobQueue) -> None:
        for folder in queue.waiting_jobs(workspace):
            perform(workspace, folder.name)

    monkeypatch.setattr(JobQueue, "tick", train_now)
    monkeypatch.chdir(tmp_path)
    for name in ("rex-1.jpg", "rex-2.jpg"):
        photo(Path(name))
    code = "\n".join(block.text for block in PAGE.blocks if block.language == "python")
    for shown, here in SHORTER.items():
        assert shown in code
        code = code.replace(shown, here)
    code = code.replace("http://studio.example.org:7860", served.url)
    names = dict[str, Any]()
    exec(compile(code, PAGE.name, "exec"), names)
    run = served.context.job(names["run"])
    assert (run.state, run.step, run.record.owner, names["refused"]) == ("done", 2, "ann", [])
    adapter = Path(names["adapter"])
    assert adapter.read_bytes() == next(run.folder.glob("*.safetensors")).read_bytes()
    assert names["state"]["state"] == "done"
    components, _ = load_adapted(EMBEDDED, adapter)
    guidance = float(run.settings["validation_guidance_scale"])
    settings = SamplingSettings(guidance_scale=guidance, steps=2)
    wanted = generate_images(components, "a photo of a sks dog at night", [7, 8], settings)
    for file, image in zip(names["images"], wanted, strict=True):
        with Image.open(file) as opened:
            assert opened.tobytes() == image.tobytes()
            assert "Seed: " in opened.text["parameters"]  # type: ignore[attr-defined]
    (variant,) = names["variants"]
    seed = int(re.search(r"-(\d+)\.png$", variant)[1])  # type: ignore[index]
    start = dataclasses.replace(settings, image=open_photo(names["images"][0]), denoise=0.5)
    [expected] = generate_images(components, "a sks dog made of glass", [seed], start)
    with Image.open(variant) as opened:
        assert opened.tobytes() == expected.tobytes()


def test_a_waiting_program_sees_each_change_and_why_a_job_failed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_PERIOD_SECONDS", 0.0)
    folder = make(served.context.workspace, "sks mug", max_train_steps=3)
    states = served.bob.submit(folder.name, api_name="/wait")
    first = next(states)
    assert first["state"] == "waiting"
    (folder / records.LOG).write_text("error: out of luck\n", encoding="utf-8")
    records.write_result(folder, records.JobResult(1))
    assert first.keys() == {
        "state", "phase", "step", "total", "remaining_seconds", "position", "owner",
        "checkpoints", "trigger",
    }  # fmt: skip
    seen = [first, *states]
    assert seen[-1]["state"] == "failed"
    assert all(one != other for one, other in itertools.pairwise(seen))
    with pytest.raises(AppError, match="Sks mug is failed: out of luck"):
        states.result()
    assert "this run no longer exists" in refused(served.bob, "wait", "../x").lower()


def test_captions_find_their_photos_and_refused_files_are_named(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 100_000)
    (tmp_path / "large.jpg").write_bytes(b"x" * 100_001)
    (tmp_path / "ab.txt").write_text("a sks dog", encoding="utf-8")
    (tmp_path / "none.txt").write_text("a cat", encoding="utf-8")
    photo(tmp_path / "ab.jpg")
    files = [handle_file(tmp_path / name) for name in ("none.txt", "ab.txt", "large.jpg", "ab.jpg")]
    made, lines = served.ann.predict("Rex", files, "dog", "zwx", api_name="/upload")
    assert [line.partition(":")[0] for line in lines] == ["large.jpg", "none.txt"]
    stored = read_subject(served.context.workspace, made)
    assert (stored.title, stored.class_word, stored.token) == ("Rex", "dog", "zwx")
    assert stored.photos[0].with_suffix(".txt").read_text(encoding="utf-8") == "a sks dog\n"
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 1)
    before = served.files
    assert "at most 1" in refused(served.ann, "upload", "Two", [files[3], files[2]])
    assert served.files == before


@pytest.mark.parametrize(("content", "name"), NO_PHOTOS)
def test_what_is_no_photo_is_refused_and_nothing_is_left(
    content: bytes, name: str, served: Served, tmp_path: Path
) -> None:
    before = served.files
    (tmp_path / name).write_bytes(content)
    file = handle_file(tmp_path / name)
    assert name in refused(served.ann, "upload", "Other", [file])
    assert name in refused(served.ann, "generate", MODEL, "a mug", {"image": file})
    assert served.files == before


GONE, STOLEN = "no longer exists", {"path": "/etc/passwd"}
UPLOADED = {**STOLEN, "meta": {"_type": "gradio.FileData"}, "orig_name": "passwd"}
REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("upload", ("", ["x"]), "give the new subject a name and photos"),
    ("upload", ("Rex", []), "give the new subject a name and photos"),
    ("upload", ("x" * 61, ["x"]), "at most 60 are taken"),
    ("upload", ("Rex", "a.jpg"), "files is 'a.jpg'; it must be a list"),
    ("upload", ("Rex", ["/etc/passwd"]), "'/etc/passwd' is not an uploaded file"),
    ("upload", ("Rex", [STOLEN]), "is not an uploaded file; give handle_file"),
    ("upload", ("Rex", [{"path": "a\0"}]), "is not an uploaded file; give handle_file"),
    ("train", ("x", {}), "subjects is 'x'; it must be a list"),
    ("train", (["../../x"], {}), GONE),
    ("train", ([], {}), "there is no subject yet"),
    ("train", (["SUBJECT"], {"rnak": 3}), r"rnak is not a setting (did you mean rank?)"),
    (
        "train",
        (["SUBJECT"], {"cuda_graph": True}),
        "cuda_graph was removed: no GPU has run it",
    ),
    (
        "train",
        (["SUBJECT"], {"network_dim": 4}),
        "network_dim of sd-scripts is not here",
    ),
    ("train", (["SUBJECT"], {"output_dir": "x"}), "output_dir is set by the app itself"),
    ("train", (["SUBJECT"], {"rank": "\x1b[31m"}), "rank is "),
    ("train", (["SUBJECT"], {}, "x"), "there is no preset 'x'"),
    ("train", (["SUBJECT"], {}, "slider"), "leave subjects out"),
    ("generate", (MODEL, " ", {}), "write a prompt"),
    ("generate", ("../x", "a mug", {}), GONE),
    ("generate", (MODEL, "a mug", {"output": "x"}), "output is not a setting of images"),
    ("generate", (MODEL, "a mug", {"hires": 2}), "hires was removed: use Hires. fix of Forge or"),
    ("generate", (MODEL, "a mug", {"stesp": 3}), "(did you mean steps?)"),
    ("generate", (MODEL, "a mug", {"steps": 500}), "steps is 500; it must be at most 200"),
    ("generate", (MODEL, "a mug", {"width": 4096}), "width is 4096; it must be"),
    ("generate", (MODEL, "a mug", {"num_images": 17}), "“images” is 17"),
    ("generate", (MODEL, "a mug", {"image": STOLEN}), "is not an uploaded file"),
    ("generate", (MODEL, "a mug", [1]), "settings is [1]; it must be a dict"),
    ("fetch", ("../x",), GONE),
]


@pytest.mark.parametrize(("name", "values", "line"), REFUSED)
def test_an_invalid_request_is_refused_by_one_line(
    name: str, values: tuple[Any, ...], line: str, served: Served, subject: str
) -> None:
    before = served.files
    filled = [[subject] if value == ["SUBJECT"] else value for value in values]
    assert line.lower() in refused(served.ann, name, *filled).lower()
    assert served.files == before


def test_files_that_were_not_uploaded_are_refused_by_gradio_too(served: Served) -> None:
    body = {"data": ["Rex", [UPLOADED], "dog", "sks"]}
    url = f"{served.url}gradio_api/call/upload"
    event = httpx.post(url, json=body, cookies=served.ann.cookies).json()["event_id"]
    answer = httpx.get(f"{url}/{event}", cookies=served.ann.cookies, timeout=None).text
    assert "was not uploaded by a user" in answer


def test_every_setting_of_the_page_can_be_given_and_no_other(served: Served, subject: str) -> None:
    wrong: tuple[Any, ...] = ({"a": {"b": 1}}, [["x"]])
    for name in SETTINGS:
        is_offered = name in (*ADVANCED, *PROMPTS, api._MODEL, api._SAMPLES)
        for value in wrong:
            with pytest.raises(ValueError, match=name) as error:
                api._training(served.context, [subject], {name: value}, "balanced")
            words = "is code" if name == "feature" else "set by the app itself"
            assert (words in str(error.value)) != is_offered, name
    for name in UNSET.keys() - {"prompt"}:
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name}|is not an uploaded file"):
                api._form(served.context.workspace, "a mug", {name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_page_s(preset: str, served: Served, subject: str) -> None:
    context, is_slider = served.context, preset == "slider"
    prompts = {"target": "a mug", "positive": "a large mug", "negative": "a small mug"}
    values = preset_values(preset, EMBEDDED, context.device()) | {"rank": 3, "seed": 9}
    keep_words(context.workspace, subject, "dog", "<sks>")
    texts = [setting_text(values[name]) for name in ADVANCED]
    lines = [prompts.get(name, "") for name in PROMPTS] if is_slider else []
    wanted, _ = read_form(context, subject, EMBEDDED, "<sks>", "dog", "", *texts, (), *lines)
    given = {"rank": 3, "seed": "9", **({n: [p] for n, p in prompts.items()} if is_slider else {})}
    config, _ = api._training(context, [] if is_slider else [subject], given, preset)
    assert config == wanted


def test_users_share_runs_and_the_queue_and_deleted_runs_are_not_found(
    served: Served, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = served.ann.predict([subject], {"seed": 1}, "balanced", "One", api_name="/train")
    second = served.bob.predict([subject], {"seed": 2}, api_name="/train")
    jobs = {job.id: job for job in served.context.jobs(fresh=True)}
    assert [(jobs[run].record.owner, jobs[run].position) for run in (first, second)] == [
        ("ann", 1), ("bob", 2),
    ]  # fmt: skip
    seen = served.bob.submit(first, api_name="/wait")
    assert (next(seen)["owner"], jobs[first].title) == ("ann", "One")
    same = "same photos and settings is number 2 in the queue already"
    assert same in refused(served.ann, "train", [subject], {"seed": 2})
    assert "no adapter yet" in refused(served.bob, "fetch", first)
    monkeypatch.setattr(queue, "_MOST_JOBS_WAITING", 2)
    assert "queue is full" in refused(served.ann, "train", [subject], {"seed": 3})
    delete_job(served.context.workspace, first)
    served.context.jobs(fresh=True)
    with pytest.raises(AppError, match=GONE):
        seen.result()
    assert GONE in refused(served.ann, "fetch", first)


def test_a_shared_app_loads_the_listed_models_alone(
    served: Served, subject: str, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = dataclasses.replace(served.context.launch, host="0.0.0.0")
    monkeypatch.setattr(served.context, "launch", shared)
    for setting in ("pretrained_model_name_or_path", "model_config"):
        line = refused(served.ann, "train", [subject], {setting: str(sd1_folder)})
        assert "This app is shared, and" in line
    line = refused(served.ann, "generate", f"base/{sd1_folder}", "a mug", {})
    assert "This app is shared, and offers only" in line


def test_bombs_and_strips_are_refused(served: Served, tmp_path: Path) -> None:
    bomb, strip = huge_png(tmp_path / "bomb.png"), photo(tmp_path / "s.png", (600, 20))
    for file, words in ((bomb, "megapixels"), (strip, "strip")):
        assert words in refused(served.ann, "upload", "Rex", [handle_file(file)])
        values = {"image": handle_file(file)}
        assert words in refused(served.ann, "generate", MODEL, "a mug", values)
