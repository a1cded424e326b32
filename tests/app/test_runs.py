"""Real runs of a tiny random model: train, stop, resume, kill, generate, export, merge."""

from __future__ import annotations

import html
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_diffusion.app.html import status_card
from dora_diffusion.app.settings import as_yaml, command_line
from dora_diffusion.app.studio import Picture, Request, Studio, read_settings
from dora_diffusion.cli import main
from dora_diffusion.config import TrainConfig
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.generate import BrokenImageError
from dora_diffusion.images import save_png
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.exports import chosen_adapter, export_adapter, start_merge, write_card
from dora_diffusion.jobs.processes import Lock
from dora_diffusion.jobs.snapshot import Job, adapter_of, log_warnings, read_job, read_metrics
from dora_diffusion.jobs.workspace import AppError, Workspace, read_json
from dora_diffusion.training.sheets import labelled_sheet


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.effect_noise((80, 64), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


@pytest.fixture
def queue(workspace: Workspace) -> Iterator[jobs.JobQueue]:
    """A queue whose workers do not outlive the test."""
    one = jobs.JobQueue(workspace)
    yield one
    one.close()
    for folder in workspace.root.iterdir():
        worker = jobs.worker_of(folder)
        if worker is not None:
            os.killpg(worker[0], signal.SIGKILL)


def add_run(workspace: Workspace, base: Path, photos: Path, **changes: Any) -> str:
    config: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(photos),
        "instance_prompt": "a photo of a sks dog",
        "class_word": "dog",
        "resolution": 64,
        "max_train_steps": 3,
        "rank": 2,
        "conv_rank": 2,
        "learning_rate": 1e-2,
        "num_validation_images": 0,
        "checkpointing_steps": 2,
        **changes,
    }
    return jobs.create_job(
        workspace,
        "train",
        "sks dog",
        {},
        lambda folder: as_yaml(TrainConfig.from_dict(config | {"output_dir": str(folder)})),
    )


def wait(
    workspace: Workspace, queue: jobs.JobQueue, job_id: str, until: Callable[[Job], bool]
) -> Job:
    """Tick as the app does until the job is as wanted; the limit is for a machine that hangs."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        queue.tick()
        job = read_job(workspace.root / job_id)
        assert job is not None
        if until(job):
            return job
        if job.has_ended:
            break
        time.sleep(0.1)
    pytest.fail(f"{job.state}: {(job.folder / jobs.LOG).read_text()[-2000:]}")


def done(job: Job) -> bool:
    return job.state == "done"


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, photos: Path
) -> tuple[Workspace, str]:
    """A finished run, which tests only read and export."""
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "runs").make()
    queue = jobs.JobQueue(workspace)
    job_id = add_run(workspace, sd1_folder, photos)
    wait(workspace, queue, job_id, done)
    queue.close()
    lock = Lock(workspace.device_lock)
    assert lock.take(wait=True)  # the worker may still be leaving
    lock.free()
    return workspace, job_id


def job_of(finished: tuple[Workspace, str]) -> Job:
    job = read_job(finished[0].root / finished[1])
    assert job is not None
    return job


def test_a_run_ends_with_an_adapter_and_its_measurements(finished: tuple[Workspace, str]) -> None:
    job = job_of(finished)
    assert (job.state, job.step, job.total) == ("done", 3, 3)
    assert job.checkpoints == ("checkpoint-2", "checkpoint-3")
    assert job.trigger == "sks dog"
    assert job.result["peak_memory"] > 0.05
    assert job.progress["device"] == "cpu"


def test_the_command_that_is_shown_makes_the_same_adapter(
    finished: tuple[Workspace, str], tmp_path: Path
) -> None:
    """To the last bit: the page's run and its command line are one thing."""
    from safetensors.torch import load_file

    job = job_of(finished)
    shown = command_line(TrainConfig.from_dict(job.settings))
    words = shlex.split(shown.replace("\\\n", " "))
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    assert words[:2] == ["python", "-m"]
    subprocess.run(
        [sys.executable, *words[1:]], check=True, capture_output=True, env={**os.environ}
    )
    name = "pytorch_lora_weights.safetensors"
    ours, again = load_file(job.folder / name), load_file(tmp_path / "again" / name)
    assert set(ours) == set(again)
    assert all(ours[key].equal(again[key]) for key in ours)


def test_stop_saves_and_resume_goes_on_counting(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path, photos: Path
) -> None:
    job_id = add_run(
        workspace, sd1_folder, photos, max_train_steps=100_000, checkpointing_steps=100_000
    )
    wait(workspace, queue, job_id, lambda job: job.step >= 2)
    jobs.stop_job(workspace.root / job_id)
    stopped = wait(workspace, queue, job_id, lambda job: job.state == "stopped")
    (checkpoint,) = stopped.checkpoints
    at = int(checkpoint.removeprefix("checkpoint-"))
    assert at >= 2
    jobs.requeue_job(workspace.root / job_id)
    again = wait(workspace, queue, job_id, lambda job: job.step > at)
    assert again.progress["first_step"] == at
    steps = [record["step"] for record in read_metrics(again.folder)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_worker_is_a_crash_and_its_run_can_go_on(
    workspace: Workspace, queue: jobs.JobQueue, sd1_folder: Path, photos: Path
) -> None:
    job_id = add_run(workspace, sd1_folder, photos, max_train_steps=100_000, checkpointing_steps=2)
    folder = workspace.root / job_id
    wait(workspace, queue, job_id, lambda job: bool(job.checkpoints))
    worker = jobs.worker_of(folder)
    assert worker is not None
    os.kill(worker[0], signal.SIGKILL)
    crashed = wait(workspace, queue, job_id, lambda job: job.state == "crashed")
    at = int(crashed.checkpoints[-1].removeprefix("checkpoint-"))
    lock = Lock(workspace.device_lock)
    assert lock.take(wait=True)  # the kernel frees it when the last thread has ended
    lock.free()
    jobs.requeue_job(folder)
    assert wait(workspace, queue, job_id, lambda job: job.step > at).progress["first_step"] == at


def test_a_run_that_cannot_work_says_why(
    workspace: Workspace, queue: jobs.JobQueue, photos: Path, tmp_path: Path
) -> None:
    job_id = add_run(workspace, tmp_path / "no-model", photos)
    job = wait(workspace, queue, job_id, lambda job: job.state == "failed")
    assert "no-model does not exist" in job.cause
    assert "\n" not in job.cause


@pytest.fixture(scope="module")
def studio(finished: tuple[Workspace, str]) -> Studio:
    return Studio(finished[0])


def ask(finished: tuple[Workspace, str], **changes: Any) -> Request:
    job = job_of(finished)
    values = {"prompt": "a photo of a sks dog", "seed": 5, "steps": 2, "width": 64, "height": 64}
    return Request(job.base, adapter_of(job), **(values | changes))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_one_seed_gives_the_same_pixels_and_the_file_says_how(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    (first,), (second,) = studio.make(ask(finished)), studio.make(ask(finished))
    assert pixels(first.path) == pixels(second.path)
    found = read_settings(first.path)
    assert (found["Prompt"], found["Seed"], found["Steps"]) == ("a photo of a sks dog", "5", "2")
    assert found["Adapter strength"] == "1"
    assert str(finished[0].root) not in first.parameters


def test_strength_0_is_the_base_and_1_is_not(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    base, adapted = studio.compare(ask(finished))
    (plain,) = studio.make(ask(finished, strength=0.0))
    (full,) = studio.make(ask(finished))
    assert pixels(plain.path) == pixels(base.path)
    assert pixels(full.path) == pixels(adapted.path) != pixels(base.path)
    assert "Adapter" not in base.parameters


def test_direction_and_magnitude_are_written_into_the_file(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    (picture,) = studio.make(ask(finished, direction=0.5, magnitude=0.0))
    found = read_settings(picture.path)
    assert (found["Direction strength"], found["Magnitude strength"]) == ("0.5", "0")


def test_the_page_reads_an_adapters_strengths_back(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.app.views.request import field_value

    def fields(picture: Picture) -> list[Any]:
        found = read_settings(picture.path)
        return [field_value(name, found) for name in ("strength", "direction", "magnitude")]

    adapted = ask(finished, strength=0.75, direction=0.5)
    assert fields(studio.make(adapted)[0]) == [0.75, 0.5, 1]
    assert fields(studio.make(ask(finished))[0]) == [1, 1, 1]
    assert fields(studio.compare(adapted)[0]) == [None, None, None]


def test_the_page_says_what_of_a_long_prompt_was_not_read(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.app.views.generate import _results

    short = ask(finished)
    long = ask(finished, prompt="a photo of a sks dog" + " on grass" * 60 + " by the <lake>")
    adapters = {"result": short.adapter}
    for pictures in (
        studio.make(long),
        studio.compare(long),
        [studio.grid(long, adapters, [1.0], lambda *_: None)],
    ):
        for picture in pictures:
            (line,) = picture.unread
            assert line.startswith("The prompt is longer than the model's 77 tokens; it did not")
            assert line.endswith("by the < lake >")
    assert "by the &lt; lake &gt;" in _results(gallery=pictures)[-1]
    (negative,) = studio.make(ask(finished, negative_prompt="blurred, " * 80))[0].unread
    assert negative.startswith("The negative prompt is longer")
    assert studio.make(short)[0].unread == ()
    assert "longer than" not in _results(pair=studio.compare(short))[-1]


def test_images_that_would_be_black_are_refused_in_words(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    job, pictures = job_of(finished), finished[0].pictures
    file = adapter_of(job)
    assert file is not None
    broken = file.with_name("broken.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        {name: torch.full_like(tensor, 3e38) for name, tensor in load_file(file).items()},
        broken,
        metadata,
    )
    asked = replace(ask(finished), adapter=broken)
    before = sorted(pictures.glob("*"))
    for make in (
        studio.make,
        studio.compare,
        lambda one: studio.grid(one, {"x": broken}, [1.0], lambda *_: None),
    ):
        with pytest.raises(BrokenImageError, match=r"not finite|black all"):
            make(asked)
    broken.unlink()
    assert sorted(pictures.glob("*")) == before


def test_a_grid_has_a_cell_per_checkpoint_and_strength(
    finished: tuple[Workspace, str], studio: Studio
) -> None:
    job = job_of(finished)
    result, early = adapter_of(job), adapter_of(job, "checkpoint-2")
    assert result is not None
    assert early is not None
    steps: list[int] = []
    adapters = {"checkpoint-2": early, "result": result}
    picture = studio.grid(ask(finished), adapters, [0.0, 1.0], lambda done, _: steps.append(done))
    cells = [
        Image.open(studio.make(replace(ask(finished), adapter=adapter, strength=strength))[0].path)
        for adapter in adapters.values()
        for strength in (0.0, 1.0)
    ]
    # Names of checkpoints are longer than a small image is wide: each has a line of its own.
    title = f"Seed {picture.seed}; above each column, the strength"
    wanted = labelled_sheet(cells, title, ["checkpoint-2", "result"], ["0", "1"])
    with Image.open(picture.path) as image:
        assert image.size == wanted.size
        assert image.tobytes() == wanted.tobytes()
    assert read_settings(picture.path)["Size"] == "64x64"
    assert steps == [1, 2, 3, 4]


def test_pictures_are_refused_while_a_run_has_the_device(
    finished: tuple[Workspace, str], studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, asked = Lock(finished[0].device_lock), []
    assert lock.take()
    monkeypatch.setattr("dora_diffusion.app.studio.is_running", lambda job: asked.append(job) or 1)
    with pytest.raises(AppError, match="a run is using the device"):
        studio.make(ask(finished))
    assert len(asked) == 1, "it does not wait for a run"
    lock.free()


def test_pictures_wait_for_a_worker_that_is_leaving(
    finished: tuple[Workspace, str], studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written its result, and lets go of the device when its process has ended."""
    lock = Lock(finished[0].device_lock)
    assert lock.take()
    leaving = threading.Timer(0.5, lock.free)
    leaving.start()
    assert len(studio.make(ask(finished))) == 1
    leaving.join()
    assert lock.take()
    monkeypatch.setattr("dora_diffusion.app.studio.LEAVING_SECONDS", 0.0)
    with pytest.raises(AppError, match="a run is using the device"):
        studio.make(ask(finished))
    lock.free()


@pytest.mark.parametrize(
    "changes",
    [{"prompt": ""}, {"count": 99}, {"steps": 0}, {"width": 10_000}, {"strength": 99},
     {"seed": -2}],
)  # fmt: skip
def test_requests_have_limits(finished: tuple[Workspace, str], changes: dict[str, Any]) -> None:
    with pytest.raises(AppError):
        ask(finished, **changes)


def test_only_pictures_that_say_how_they_were_made_load(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    for name, match in (("a.png", "does not say"), ("b.png", "cannot be read")):
        with pytest.raises(AppError, match=match):
            read_settings(tmp_path / name)


def test_settings_load_from_a_grid_that_is_a_strip(tmp_path: Path) -> None:
    path = save_png(Image.new("RGB", (640, 20)), tmp_path / "a.png", "a dog\nSteps: 3, Seed: 7")
    assert read_settings(path)["Seed"] == "7"


@pytest.mark.parametrize("target", ["diffusers", "kohya", "lora", "peft"])
def test_the_library_gives_every_format(finished: tuple[Workspace, str], target: str) -> None:
    workspace, job = finished[0], job_of(finished)
    made = export_adapter(workspace, job, target)
    path = made.path
    assert path.is_relative_to(workspace.exports / job.id)
    suffix = ".zip" if target == "peft" else ".safetensors"
    assert path.name == f"sks-dog-{job.id[:15]}-step-3-{target}{suffix}"
    adapter = chosen_adapter(job)
    assert made.facts[0].startswith(f"{len(read_adapter(adapter).layers)} layers; ")
    if target == "peft":
        assert any("adapter_model" in name for name in zipfile.ZipFile(path).namelist())


@pytest.mark.parametrize("target", ["kohya", "comfyui", "lora"])
def test_a_download_says_what_the_command_line_says(
    finished: tuple[Workspace, str],
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workspace, job = finished[0], job_of(finished)
    made = export_adapter(workspace, job, target)
    output = tmp_path / "a.safetensors"
    words = ["convert", str(chosen_adapter(job)), str(output), "--to", target, "--base", job.base]
    assert main(words) == 0
    _, *said = capsys.readouterr().out.splitlines()  # the first line names the file
    exact = [line for line in said if line.startswith("exact")]
    assert list(made.facts[1:]) == exact
    wrong = [line.removeprefix("wrong: ") for line in said if line.startswith("wrong: ")]
    assert bool(wrong) == (target != "lora") == bool(made.cautions)
    if wrong:
        assert made.cautions[-1].startswith(f"Wrong in {wrong[0].partition(';')[0]}: ")
    for line in said:
        if line.startswith("relative error"):
            assert made.facts[0].endswith(line)


def test_what_the_source_file_lacked_is_said(
    workspace: Workspace, sd1_folder: Path, finished: tuple[Workspace, str]
) -> None:
    """An adapter file without its metadata does not say its alpha; both exports assume one."""
    job = copy_of(finished, workspace)
    file = adapter_of(job)
    assert file is not None
    tensors = {name: tensor for name, tensor in load_file(file).items() if "alpha" not in name}
    save_file(tensors, file)
    made = export_adapter(workspace, job, "kohya")
    assert any("alpha" in caution for caution in made.cautions), made
    queue = jobs.JobQueue(workspace)
    merge = wait(workspace, queue, start_merge(workspace, job, 1.0), done)
    queue.close()
    assert any("alpha" in line for line in log_warnings(merge.folder))
    card = html.unescape(status_card(merge))
    assert all(line in card for line in log_warnings(merge.folder))


def copy_of(finished: tuple[Workspace, str], workspace: Workspace) -> Job:
    """The finished run in a workspace whose files a test may change."""
    folder = workspace.root / finished[1]
    shutil.copytree(finished[0].root / finished[1], folder)
    job = read_job(folder)
    assert job is not None
    return job


def test_only_the_latest_attempt_s_warnings_are_shown(tmp_path: Path) -> None:
    bar = "steps:  50%\r"
    (tmp_path / jobs.LOG).write_text(
        f"--- 1 a ---\nwarning: old\n--- 2 a ---\n{bar}warning: new\nwarning: new\n{bar}done\n"
    )
    assert log_warnings(tmp_path) == ("new",)
    assert log_warnings(tmp_path / "nowhere") == ()


def test_an_unknown_format_is_refused(finished: tuple[Workspace, str]) -> None:
    with pytest.raises(AppError):
        export_adapter(finished[0], job_of(finished), "../../etc")


def test_a_merge_is_a_job_and_its_result_loads(finished: tuple[Workspace, str]) -> None:
    from dora_diffusion.formats.files.header import read_header

    workspace, job = finished[0], job_of(finished)
    queue = jobs.JobQueue(workspace)
    merge = wait(workspace, queue, start_merge(workspace, job, 1.0), done)
    queue.close()
    output = Path(merge.facts["output"])
    assert output.is_relative_to(workspace.exports)
    assert any(name.startswith("model.diffusion_model.") for name in read_header(output).specs)
    assert merge.step == merge.total > 100


def test_merges_of_a_run_do_not_replace_each_other(finished: tuple[Workspace, str]) -> None:
    workspace, job = finished[0], job_of(finished)
    asked = [(1.0, ""), (0.5, ""), (0.5, "checkpoint-2")]
    outputs = []
    for strength, checkpoint in asked:
        merge = workspace.root / start_merge(workspace, job, strength, checkpoint)
        outputs.append(Path(read_json(merge / jobs.JOB)["output"]).name)
        jobs.delete_job(workspace, merge.name)
    named = f"sks-dog-{job.id[:15]}"
    assert outputs == [
        f"{named}-step-3-strength-1-merged.safetensors",
        f"{named}-step-3-strength-0.5-merged.safetensors",
        f"{named}-step-2-strength-0.5-merged.safetensors",
    ]


def test_the_model_card_can_be_downloaded(finished: tuple[Workspace, str]) -> None:
    job = job_of(finished)
    card = write_card(finished[0], job)
    assert card.name == f"sks-dog-{job.id[:15]}-step-3-README.md"
    assert "sks dog" in card.read_text(encoding="utf-8")
