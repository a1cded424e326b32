"""A run's base model is loaded for images as the run loaded it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_diffusion.app.settings import as_yaml
from dora_diffusion.config import TrainConfig
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.exports import merge_command, start_merge
from dora_diffusion.jobs.loading import ModelFiles, load_model
from dora_diffusion.jobs.snapshot import read_job
from dora_diffusion.jobs.workspace import AppError, Workspace, write_json
from dora_diffusion.models.load import load_vae


def write_other_vae(source: Path, target: Path) -> torch.Tensor:
    """The VAE of a folder with one weight changed; that weight."""
    vae = load_vae(source)
    weight = vae.decoder.conv_out.weight
    with torch.no_grad():
        weight.add_(1.0)
    vae.save_pretrained(target)
    return weight.detach()


def test_another_vae_is_used_for_images_too(sd1_folder: Path, tmp_path: Path) -> None:
    changed = write_other_vae(sd1_folder, tmp_path / "vae")
    plain = load_model(str(sd1_folder), None, ModelFiles())
    other = load_model(str(sd1_folder), None, ModelFiles(vae=str(tmp_path / "vae")))
    loaded = other.vae.decoder.conv_out.weight.float().cpu()
    assert torch.equal(loaded, changed.to(other.vae.dtype).float())
    assert not torch.equal(loaded, plain.vae.decoder.conv_out.weight.float().cpu())
    assert not other.vae.decoder.conv_out.weight.requires_grad


def test_what_a_run_names_is_what_is_loaded() -> None:
    settings = TrainConfig(
        pretrained_vae_model_name_or_path="v", model_config="c", variant="fp16", revision="r"
    ).to_dict()
    assert ModelFiles.of(settings) == ModelFiles("v", "c", "fp16", "r")
    assert ModelFiles.of({"variant": ""}) == ModelFiles()
    assert ModelFiles().base("org/model") == "org/model"


def test_a_merge_takes_the_same_files_and_says_so(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "runs").make()
    config = TrainConfig(
        max_train_steps=3, class_word="mug", pretrained_vae_model_name_or_path="/a vae",
        model_config="/config", variant="fp16",
    )  # fmt: skip
    run = workspace.root / jobs.create_job(
        workspace, "train", "sks mug", {}, lambda _: as_yaml(config)
    )
    (run / "checkpoint-3").mkdir()
    for name in ("training_state.pt", "pytorch_lora_weights.safetensors"):
        (run / "checkpoint-3" / name).write_bytes(b"x")
    write_json(run / jobs.RESULT, {"code": 143})
    job = read_job(run)
    assert job is not None
    merge = workspace.root / start_merge(workspace, job, 1.0)
    facts = json.loads((merge / jobs.JOB).read_text())
    assert (facts["vae"], facts["config"], facts["variant"]) == ("/a vae", "/config", "fp16")
    shown = read_job(merge)
    assert shown is not None
    assert merge_command(shown).endswith("--vae '/a vae' --config /config --variant fp16")


@pytest.mark.parametrize(
    ("text", "pixels"), [("", None), (" ", None), ("512", 512), ("100", 96), (64, 64), ("3", 8)]
)
def test_an_empty_size_is_the_model_s(text: object, pixels: int | None) -> None:
    assert _asked(width=text).width == pixels


@pytest.mark.parametrize("text", ["0", "-8", "wide", "1.5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(AppError, match=r"height is .*; write pixels"):
        _asked(height=text)


def _asked(**changes: object) -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed")
    from dora_diffusion.app.views.request import BASE, make_request

    form: dict[str, Any] = {
        "prompt": "a mug", "negative_prompt": "", "seed": 1, "count": 1, "steps": 2,
        "guidance_scale": 2, "scheduler": None, "width": "", "height": "", "strength": 1,
        "direction": 1, "magnitude": 1,
    }  # fmt: skip
    context: Any = SimpleNamespace(allowed_model=lambda name: name)
    return make_request(context, f"{BASE}/embedded:tiny-sd", form | changes)
