"""Jobs, photos and models as tests need them."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import save_file

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.studio import worker
from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import start_time
from dora_diffusion.studio.jobs.records import SETTINGS, JobRecord, train_arguments
from dora_diffusion.studio.jobs.snapshot import Job, read_job
from dora_diffusion.studio.jobs.store import Workspace, write_json
from tests.waiting import wait_until


def make(workspace: Workspace, title: str = "sks mug", **settings: Any) -> Path:
    """A waiting run; with settings, if any are given."""
    folder = workspace.new_job()
    config = TrainConfig.from_dict({**settings, "output_dir": str(folder)})
    files = {SETTINGS: as_yaml(config)} if settings else {}
    jobs.create_job(folder, JobRecord(train_arguments(folder), title), files)
    return folder


def about(run: Path, *words: str, title: str = "Merge", **more: Any) -> Path:
    """A waiting job about a run."""
    folder = Workspace(run.parent).new_job()
    jobs.create_job(folder, JobRecord(list(words or ["export"]), title, run=run.name, **more))
    return folder


def pretend_running(folder: Path, child: subprocess.Popen[bytes]) -> None:
    write_json(folder / records.WORKER, {"pid": child.pid, "start": start_time(child.pid)})


def seen(folder: Path) -> Job:
    job = read_job(folder)
    assert job is not None
    return job


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
    return make(workspace, "sks dog", **config).name


def wait(
    workspace: Workspace, queue: jobs.JobQueue, job_id: str, until: Callable[[Job], bool]
) -> Job:
    """Tick as the app does until the job is as wanted."""

    def look() -> Job | None:
        queue.tick()
        job = seen(workspace.root / job_id)
        if until(job):
            return job
        log = job.folder / records.LOG
        assert not job.has_ended, f"{job.state}: {log.read_text(encoding='utf-8')[-2000:]}"
        return None

    def moved() -> tuple[object, ...]:
        job = seen(workspace.root / job_id)
        return job.state, job.step, job.progress.phase

    return cast("Job", wait_until(look, moved=moved))


def done(job: Job) -> bool:
    return job.state == "done"


def attempt(workspace: Workspace, job_id: str) -> Job:
    """Have a job begun as its worker does it, in this process, and return what became of it."""
    folder = workspace.root / job_id
    with (
        (folder / records.LOG).open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = worker._run(folder)
    records.write_result(folder, records.JobResult(code))
    return seen(folder)


def perform(workspace: Workspace, job_id: str) -> Job:
    """The same for one that ends well."""
    job, folder = attempt(workspace, job_id), workspace.root / job_id
    assert done(job), (folder / records.LOG).read_text(encoding="utf-8")
    return job


def job_of(finished: tuple[Workspace, str]) -> Job:
    job = read_job(finished[0].root / finished[1])
    assert job is not None
    return job


METRICS = '{{"step": {step}, "loss": 0.{step}, "seconds": 2.0}}\n'


def started_run(workspace: Workspace, steps: int, title: str = "sks mug") -> Path:
    folder = make(workspace, title, max_train_steps=10, token="sks", class_word="mug")
    lines = "".join(METRICS.format(step=step) for step in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def ended_run(workspace: Workspace, steps: tuple[int, ...], last: int, code: int = 143) -> Job:
    """A run that ended at step ``last`` with checkpoints, as its folder would tell it."""
    folder = make(workspace, max_train_steps=last, token="sks", class_word="mug")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        for name in ("training_state.pt", "pytorch_lora_weights.safetensors"):
            (folder / f"checkpoint-{step}" / name).write_bytes(b"x")
    (folder / "metrics.jsonl").write_text(
        f'{{"step": {last}, "loss": 1, "seconds": 1}}\n', encoding="utf-8"
    )
    write_json(folder / records.RESULT, {"code": code})
    return seen(folder)


def photo(path: Path, size: tuple[int, int] = (96, 64), **options: object) -> Path:
    image = Image.effect_noise(size, 80).convert("RGB")
    image.save(path, **options)
    return path


# What can stand in place of a file of JSON, YAML or metrics; None is a folder.
DAMAGES: dict[str, bytes | None] = {
    "empty": b"", "truncated": b'{"kind": "train", "tit', "binary": b"\x80\0\xff\n",
    "list": b"[1]\n", "word": b"3\n", "deep": b"[" * 1500 + b"\n", "folder": None,
}  # fmt: skip


def damage(path: Path, content: bytes | None) -> None:
    """Put something else in place of a file."""
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir(parents=True)
    elif path.name == "metrics.jsonl" and content:  # a last line without an end may be unfinished
        path.write_bytes(content.rstrip(b"\n") + b"\n")
    else:
        path.write_bytes(content)


def write_folder(folder: Path, *, kind: str = "UNet2DConditionModel", weights: bool = True) -> Path:
    (folder / "unet").mkdir(parents=True)
    index = {"unet": ["diffusers", kind], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]}
    (folder / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights:
        (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    return folder


def write_checkpoint(path: Path, family: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({FAMILIES[family].checkpoint_key: torch.zeros(1)}, path)
    return path
