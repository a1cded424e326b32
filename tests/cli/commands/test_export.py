"""``dora-diffusion export``: a merged model from a run's folder."""

from __future__ import annotations

import torch

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.models.load import load_components


def test_it_writes_a_model_that_acts_like_the_adapter(
    sd1_folder, trained, tmp_path, capsys, last_line
):
    argv = ["export", "--base", str(sd1_folder), "--adapter", str(trained)]
    merged = tmp_path / "merged"
    assert main([*argv, "--output", str(merged)]) == 0
    assert f"{merged} (reopened and checked)" in capsys.readouterr().out
    base = load_components(sd1_folder).denoiser.state_dict()
    changed = [
        name
        for name, value in load_components(merged).denoiser.state_dict().items()
        if not torch.equal(value, base[name])
    ]
    layers = [name.removeprefix("unet.") for name in read_adapter(trained).layers]
    assert sorted(changed) == sorted(f"{name}.weight" for name in layers)
    assert main([*argv, "--output", str(merged)]) == 1
    assert "exists" in last_line()


def test_a_name_with_a_suffix_is_one_file_in_the_precision_that_is_asked_for(
    sd1_folder, trained, tmp_path
):
    argv = ["export", "--base", str(sd1_folder), "--adapter", str(trained), "--dtype", "fp16"]
    file = tmp_path / "merged.safetensors"
    assert main([*argv, "--output", str(file)]) == 0
    loaded = load_components(sd1_folder)
    from safetensors import safe_open

    key = "model.diffusion_model.time_embed.0.weight"
    with safe_open(file, "pt") as tensors:
        written = tensors.get_tensor(key)
    assert torch.equal(written, loaded.denoiser.time_embedding.linear_1.weight.half())
