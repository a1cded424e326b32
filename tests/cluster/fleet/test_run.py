"""Fleets in one process: what is trained, what is not repeated, and what is said of the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from dora_diffusion.cluster.fleet import run as module
from dora_diffusion.cluster.fleet import subject as worker_side
from dora_diffusion.cluster.fleet.connection import connect
from dora_diffusion.cluster.fleet.results import (
    SubjectRecord,
    settings_digest,
)
from dora_diffusion.cluster.fleet.run import run_fleet
from dora_diffusion.cluster.fleet.subject import FleetSubject, train_subjects
from dora_diffusion.config import ConfigError
from dora_diffusion.training.recipe import train
from tests.cluster.fleet.helpers import DEADLY, NAMES, STEP, assert_same_results, losses
from tests.refusal import refused


@pytest.fixture
def trained(monkeypatch):
    """Names of the subjects that a worker was given."""
    names = []

    def note(subjects, worker):
        names.extend(subject.record.name for subject in subjects)
        return train_subjects(subjects, worker)

    monkeypatch.setattr(module, "train_subjects", note)
    return names


def test_each_subject_is_that_of_a_run_of_its_own(serial, subjects, tmp_path):
    """The base that stays in the worker is as it was loaded: a cold run gives the same bits."""
    train(replace(subjects[NAMES[-1]], output_dir=str(tmp_path / NAMES[-1])))
    assert_same_results(tmp_path, Path(serial.output), NAMES[-1:])  # behind two others


def test_records_say_what_each_took(serial):
    lines = (Path(serial.output) / "fleet.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["name"] for record in records] == list(NAMES)
    for record in records:
        assert (record["status"], record["steps"], record["attempts"]) == ("done", 4, 1)
        assert record["seconds"] >= record["train_seconds"] > 0
        assert record["cpu_seconds"] > 0
        assert record["peak_bytes"] > 2**27
        assert {"start_seconds", "worker", "node", "cause"} <= record.keys()
        assert "settings" not in record


def test_the_page_shows_every_subject_and_its_images(serial):
    page = (Path(serial.output) / "index.html").read_text(encoding="utf-8")
    assert "3 subjects: 3 done, 0 failed." in page
    assert all(f"<td>{name}</td>" in page for name in NAMES)
    source = f"{NAMES[-1]}/samples/base_above_adapted.png"
    assert f'src="{source}"' in page
    assert (Path(serial.output) / source).is_file()


def test_what_is_done_is_not_repeated(serial, subjects, trained, tmp_path):
    output = Path(shutil.copytree(serial.output, tmp_path / "out"))
    shutil.rmtree(output / NAMES[0])
    fleet = run_fleet(subjects, output)
    assert trained == [NAMES[0]]
    assert fleet.known == set(NAMES[1:])
    assert_same_results(output, Path(serial.output))
    again = run_fleet(subjects, output)
    assert trained == [NAMES[0]]
    assert again.records == fleet.records


def test_other_settings_or_photos_of_a_subject_that_is_done_are_said(
    serial, subjects, trained, tmp_path
):
    output = Path(shutil.copytree(serial.output, tmp_path / "out"))
    photos = Path(shutil.copytree(subjects[NAMES[1]].instance_data_dir, tmp_path / "photos"))
    moved = replace(subjects[NAMES[1]], instance_data_dir=str(photos))
    changed = {NAMES[0]: replace(subjects[NAMES[0]], rank=4), NAMES[1]: moved}
    fleet = run_fleet(changed, output)
    assert not trained
    assert [r.name for r in fleet.failed] == [NAMES[0]]  # The same photos, elsewhere, are the same.
    assert "trained already, with other settings: rank (2 -> 4)" in fleet.failed[0].cause
    next(photos.glob("*.txt")).write_text("sks robot, another caption", encoding="utf-8")
    assert "other photos or captions" in run_fleet(changed, output).failed[1].cause
    anew = {NAMES[0]: replace(changed[NAMES[0]], overwrite_output_dir=True)}
    assert not run_fleet(anew, output).failed
    assert trained == [NAMES[0]]


def test_a_subject_is_known_by_its_settings_and_photos(subjects, tmp_path):
    """A caption of the same length is another one; a folder that was copied is the same."""
    config = next(iter(subjects.values()))
    photo = next(path.name for path in Path(config.instance_data_dir).glob("*.jpg"))
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(config.instance_data_dir, folder)
    one, two = (replace(config, instance_data_dir=str(folder)) for folder in folders)
    assert settings_digest(one) == settings_digest(two)
    caption, digests = folders[0] / "caption.txt", []
    for text in ("a red mug", "a tan mug", "a red mug"):
        caption.write_text(text, encoding="utf-8")
        digests.append(settings_digest(one))
    assert digests[0] == digests[2] != digests[1]
    assert settings_digest(replace(one, rank=one.rank + 1)) != digests[0]
    for folder in ("instance_data_dir", "validation_data_dir"):
        config = replace(one, validation_data_dir=str(folders[1]))
        before, file = settings_digest(config), Path(getattr(config, folder), photo)
        data = file.read_bytes()
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])  # of the same size
        assert settings_digest(config) != before
        file.write_bytes(data)
        (file.parent / "notes.log").write_text("no photo", encoding="utf-8")
        assert settings_digest(config) == before
    assert settings_digest(replace(one, output_dir="elsewhere")) == digests[0]


def stopping(monkeypatch, error, name=DEADLY, step=STEP):
    """Have the training of a subject end at a step, once."""
    is_over = []

    def train_until(subjects, worker):
        inner = worker.report

        def stop(event):
            names = [subject.record.name for subject in subjects]
            if name in names and event.step == step and not is_over:
                is_over.append(True)
                raise error
            inner(event)

        worker.report = stop
        try:
            return train_subjects(subjects, worker)
        finally:
            worker.report = inner

    monkeypatch.setattr(module, "train_subjects", train_until)


def steps_seen(monkeypatch):
    seen = []
    inner = worker_side.train

    def watched(config, on_event, **more):
        def note(event):
            if type(event).__name__ == "TrainingStarted":
                seen.append((Path(config.output_dir).name, event.step))
            on_event(event)

        return inner(config, note, **more)

    monkeypatch.setattr(worker_side, "train", watched)
    return seen


@pytest.mark.parametrize(
    "where", ["memory", *(pytest.param(way, marks=pytest.mark.slow) for way in ("folder", "file"))]
)
def test_a_fleet_that_was_stopped_resumes_where_it_was(
    serial, subjects, monkeypatch, tmp_path, where
):
    """Ended without a word, as by a signal that nothing catches."""
    # Behind a URL, a worker's folder has a name that depends on nothing but the URL.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    output = tmp_path / "out"
    address = {"folder": str(output), "memory": "memory://shop", "file": f"file://{output}"}[where]
    one = {DEADLY: subjects[DEADLY]}
    stopping(monkeypatch, SystemExit())
    with pytest.raises(SystemExit):
        run_fleet(one, address)
    seen = steps_seen(monkeypatch)
    fleet = run_fleet(one, address)
    # The checkpoint of the step before the one that was not told of any more.
    assert seen == [(DEADLY, STEP - 1)]
    assert not fleet.failed
    if where == "memory":
        files = fsspec.filesystem("memory")
        files.get("/shop", str(output), recursive=True)
        assert not files.glob("/shop/**/.*")
        assert not files.glob("/shop/**/state.tar")
        files.rm("/shop", recursive=True)
    assert_same_results(output, Path(serial.output), (DEADLY,))
    assert len(list(output.glob("*/checkpoint-*/training_state.pt"))) == 2


@pytest.mark.slow
def test_a_pack_is_one_task_and_each_of_it_nearly_what_it_is_alone(serial, subjects, tmp_path):
    """Up to rounding; one that diverges leaves it, and one that fits in no pack is by itself."""
    given = {
        "wild": replace(subjects[NAMES[0]], learning_rate=1e30),
        NAMES[0]: subjects[NAMES[0]],
        "prodigal": replace(subjects[NAMES[0]], lora_dropout=0.1),
        NAMES[1]: subjects[NAMES[1]],
    }
    fleet = run_fleet(given, tmp_path, pack=3)
    assert {name: (r.status, r.pack) for name, r in fleet.records.items()} == {
        "wild": ("failed", 3), NAMES[0]: ("done", 3), NAMES[1]: ("done", 3),
        "prodigal": ("done", 1),
    }  # fmt: skip
    assert "the loss is nan at step 2" in fleet.records["wild"].cause
    for name in NAMES[:2]:
        ours, theirs = losses(tmp_path / name), losses(Path(serial.output) / name)
        assert ours == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in theirs]


def test_what_another_run_has_left_is_never_replaced(subjects, tmp_path):
    """Not the first time, nor when the command is given again."""
    name = NAMES[0]
    theirs = tmp_path / name / "pytorch_lora_weights.safetensors"
    theirs.parent.mkdir()
    theirs.write_bytes(b"precious")
    for _ in range(2):
        (failed,) = run_fleet({name: subjects[name]}, tmp_path).failed
        assert "already contains a trained adapter" in failed.cause
    assert theirs.read_bytes() == b"precious"


@pytest.mark.slow
def test_half_of_a_copy_is_never_taken_for_whole(serial, subjects, monkeypatch, tmp_path):
    """The connection breaks in the middle of a checkpoint's copy, and in that of a result's."""
    output, name = tmp_path / "out", NAMES[0]
    files = type(fsspec.filesystem("file"))
    put, breaks = files.put_file, [(".state.tar.part", 2), (".metrics.jsonl.part", 1)]

    def half(self, local, remote, **more):
        put(self, local, remote, **more)
        end, left = breaks[0] if breaks else ("", 0)
        if not end or not remote.endswith(end):
            return
        if left > 1:
            breaks[0] = (end, left - 1)
            return
        breaks.pop(0)
        os.truncate(remote, os.path.getsize(remote) // 2)
        raise ConnectionError("the connection is gone")

    monkeypatch.setattr(files, "put_file", half)
    only, seen = {name: subjects[name]}, steps_seen(monkeypatch)
    for _ in range(2):
        fleet = run_fleet(only, f"file://{output}")
        assert [r.cause for r in fleet.failed] == ["the connection is gone"]
        assert '"status": "running"' in (output / name / "fleet.json").read_text(encoding="utf-8")
    assert not run_fleet(only, f"file://{output}").failed
    assert [step for _, step in seen] == [0, 2, 4]
    assert losses(output / name) == losses(Path(serial.output) / name)


def test_what_is_wrong_with_one_subject_is_a_line_and_the_others_go_on(
    subjects, monkeypatch, tmp_path
):
    empty = tmp_path / "empty"
    empty.mkdir()
    given = {
        "empty": replace(subjects[NAMES[0]], instance_data_dir=str(empty)),
        "nameless": replace(subjects[NAMES[0]], instance_prompt="a photo of a mug"),
        "wild": replace(subjects[NAMES[0]], learning_rate=1e30),
        "full": replace(subjects[NAMES[1]], max_train_steps=1, checkpointing_steps=0),
        "fine": replace(subjects[NAMES[0]], max_train_steps=1, checkpointing_steps=0),
    }
    inner = worker_side.train

    def on_full_disk(config, *args, **more):
        if Path(config.output_dir).name == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{config.output_dir}/x")
        return inner(config, *args, **more)

    monkeypatch.setattr(worker_side, "train", on_full_disk)
    fleet = run_fleet(given, tmp_path / "out")
    causes = {record.name: record.cause for record in fleet.failed}
    assert list(causes) == ["empty", "nameless", "wild", "full"]
    assert "no photos in this folder" in causes["empty"]
    assert "does not contain the token" in causes["nameless"]
    assert "the loss is nan at step 2" in causes["wild"]
    assert causes["full"].endswith("full/x: No space left on device")
    assert all("\n" not in cause for cause in causes.values())
    assert fleet.records["fine"].status == "done"
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.index("<h2>Failed</h2>") < page.index("<h2>Subjects</h2>")
    # Started again, those that failed are tried again, and nothing else.
    monkeypatch.setattr(worker_side, "train", inner)
    again = run_fleet({name: given[name] for name in ("full", "fine")}, tmp_path / "out")
    assert again.known == {"fine"}
    assert again.records["full"].status == "done"


def test_an_entry_that_is_wrong_fails_alone(subjects, tmp_path):
    """Also one whose record cannot be read."""
    (tmp_path / "blocked" / "fleet.json").mkdir(parents=True)
    given = {
        "wrong": ConfigError("photos/wrong/subject.yaml: rank is -1"),
        "blocked": subjects[NAMES[0]],
        NAMES[0]: replace(subjects[NAMES[0]], max_train_steps=1, checkpointing_steps=0),
    }
    fleet = run_fleet(given, tmp_path)
    assert [record.status for record in fleet.records.values()] == ["failed", "failed", "done"]
    assert fleet.records["wrong"].cause == "photos/wrong/subject.yaml: rank is -1"
    assert fleet.records["blocked"].cause.endswith("blocked/fleet.json: Is a directory")
    assert "<td>wrong</td>" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_two_fleets_of_one_output_do_not_write_at_once(subjects, tmp_path):
    tried = []

    def start_another(fleet, ended):
        with refused("output", "another run is writing", str(tmp_path)):
            run_fleet({NAMES[1]: subjects[NAMES[1]]}, tmp_path)
        tried.append(True)

    one = replace(subjects[NAMES[0]], max_train_steps=1, checkpointing_steps=0)
    assert not run_fleet({NAMES[0]: one}, tmp_path, on_change=start_another).failed
    assert tried


@pytest.mark.parametrize("changes", [{}, {"rank": 3}])
def test_what_a_fleet_elsewhere_has_ended_meanwhile_is_done(
    subjects, trained, monkeypatch, tmp_path, changes
):
    """Behind a URL, where no lock holds off another machine; other settings are said."""
    output = f"file://{tmp_path}/out"
    one = replace(subjects[NAMES[0]], max_train_steps=1, checkpointing_steps=0)
    record = SubjectRecord(NAMES[0], "running", run="another")
    theirs = replace(one, **changes)

    def meanwhile(given, worker):
        digest = settings_digest(theirs)
        own = replace(record, digest=digest, settings=theirs.to_dict())
        (done,) = train_subjects([FleetSubject(theirs, output, own)], worker)
        assert done.status == "done"
        return train_subjects(given, worker)

    monkeypatch.setattr(module, "train_subjects", meanwhile)
    fleet = run_fleet({NAMES[0]: one}, output)
    if changes:
        assert "other settings: rank (3 -> 2)" in fleet.records[NAMES[0]].cause
    else:
        assert fleet.records[NAMES[0]].status == "done"
        assert fleet.records[NAMES[0]].run == "another"


@pytest.mark.skipif(os.name == "nt", reason="Windows has a temporary folder for each user")
def test_a_folder_of_someone_else_s_is_not_trained_in(subjects, monkeypatch, tmp_path):
    """Behind a URL a worker's folder is its user's alone, whatever there is at its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    modes = []

    def look(fleet, ended):
        (folder,) = (tmp_path / "shared").glob("dora-diffusion-*")
        modes.append(folder.stat().st_mode & 0o777)

    one = {NAMES[0]: replace(subjects[NAMES[0]], max_train_steps=1, checkpointing_steps=0)}
    url = f"file://{tmp_path}/out"
    assert not run_fleet(one, url, on_change=look).failed
    assert set(modes) == {0o700}
    (folder,) = (tmp_path / "shared").glob("dora-diffusion-*")
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="another user's or open to others"):
        run_fleet(one, url)


def test_an_unknown_file_system_is_said(subjects):
    with refused("output", "shop://x"):
        run_fleet(subjects, "shop://x")


def test_ray_that_is_not_installed_is_said(subjects, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with refused("address", "leave out --address"):
        run_fleet(subjects, tmp_path, "local")


def test_an_address_that_does_not_answer_is_said():
    pytest.importorskip("ray")
    with refused("address", "nothing answers", "127.0.0.1:1 "):
        connect("127.0.0.1:1")
    with refused("address", "somewhere is not local"):
        connect("somewhere")


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_cluster_that_refuses_may_want_a_token(monkeypatch, mode):
    """Ray does not show it to a cluster of a name unless it is told to."""
    ray = pytest.importorskip("ray")

    def refuse(**options):
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in (f"127.0.0.1:{server.getsockname()[1]}", "auto", "local"):
            with refused("address", "Failed to connect") as caught:
                connect(address)
            has_hint = "set RAY_AUTH_MODE=token" in str(caught.value)
            assert has_hint == (mode is None and ":" in address)
