"""A run's base model is loaded for images as the run loaded it."""

from __future__ import annotations

from pathlib import Path

import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.jobs.loading import ModelFiles, load_model
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
    words = " ".join(ModelFiles.of(settings).flags)
    assert words == "--vae v --config c --variant fp16 --revision r"
    assert ModelFiles().flags == []
