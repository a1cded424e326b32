"""Merging a run is a job."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.app.html import status_card
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs import records
from dora_diffusion.jobs.analyze import analyze_command, run_analysis, start_analysis
from dora_diffusion.jobs.checkpoints import adapter_of
from dora_diffusion.jobs.exports import export_adapter
from dora_diffusion.jobs.logs import log_warnings
from dora_diffusion.jobs.merge import merge_command, run_merge, start_merge
from dora_diffusion.jobs.records import TrainRequest
from dora_diffusion.jobs.snapshot import Job, read_job
from dora_diffusion.jobs.workspace import Workspace, read_json, write_json
from tests.jobs.helpers import (
    done,
    job_of,
    wait,
)


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


def test_a_merge_is_a_job_and_its_result_loads(finished: tuple[Workspace, str]) -> None:
    from dora_diffusion.formats.files.header import read_header

    workspace, job = finished[0], job_of(finished)
    queue = jobs.JobQueue(workspace)
    merge = wait(workspace, queue, start_merge(workspace, job, 1.0), done)
    queue.close()
    output = Path(merge.request.output)
    assert output.is_relative_to(workspace.exports)
    assert any(name.startswith("model.diffusion_model.") for name in read_header(output).specs)
    assert merge.step == merge.total > 100


def test_merges_of_a_run_do_not_replace_each_other(finished: tuple[Workspace, str]) -> None:
    workspace, job = finished[0], job_of(finished)
    asked = [(1.0, ""), (0.5, ""), (0.5, "checkpoint-2")]
    outputs = []
    for strength, checkpoint in asked:
        merge = workspace.root / start_merge(workspace, job, strength, checkpoint)
        outputs.append(Path(read_json(merge / records.JOB)["output"]).name)
        jobs.delete_job(workspace, merge.name)
    named = f"sks-dog-{job.id[:15]}"
    assert outputs == [
        f"{named}-step-3-strength-1-merged.safetensors",
        f"{named}-step-3-strength-0.5-merged.safetensors",
        f"{named}-step-2-strength-0.5-merged.safetensors",
    ]


def test_a_merge_takes_the_same_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "runs").make()
    config = TrainConfig(
        max_train_steps=3, class_word="mug", pretrained_vae_model_name_or_path="/a vae",
        model_config="/config", variant="fp16", revision="v2",
    )  # fmt: skip
    run = workspace.root / jobs.create_job(
        workspace, TrainRequest(), "sks mug", lambda _: as_yaml(config)
    )
    (run / "checkpoint-3").mkdir()
    for name in ("training_state.pt", "pytorch_lora_weights.safetensors"):
        (run / "checkpoint-3" / name).write_bytes(b"x")
    write_json(run / records.RESULT, {"code": 143})
    job = read_job(run)
    assert job is not None
    merge = workspace.root / start_merge(workspace, job, 1.0)
    facts = json.loads((merge / records.JOB).read_text(encoding="utf-8"))
    assert (facts["vae"], facts["config"], facts["variant"]) == ("/a vae", "/config", "fp16")
    shown = read_job(merge)
    assert shown is not None
    assert merge_command(shown.request).endswith(
        "--vae '/a vae' --config /config --variant fp16 --revision v2"
    )
    # An analysis is of the same weights.
    analysis = read_job(workspace.root / start_analysis(workspace, job))
    assert analysis is not None
    assert analyze_command(workspace, analysis.request).endswith("--variant fp16 --revision v2")

    def stop(*_: object, **options: Any) -> None:
        raise InterruptedError(options["variant"], options["revision"])

    monkeypatch.setattr("dora_diffusion.export.export_checkpoint", stop)
    monkeypatch.setattr("dora_diffusion.analysis.analyze_weights", stop)
    note = records.ProgressFile(tmp_path)
    for perform in (
        lambda: run_merge(shown.request, note),
        lambda: run_analysis(workspace, analysis.request, note),
    ):
        with pytest.raises(InterruptedError) as raised:
            perform()
        assert raised.value.args == ("fp16", "v2")
