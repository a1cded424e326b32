"""Another autoencoder for a merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import ExportError, export_checkpoint, verify_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from tests.export.helpers import MakeAdapter, tensors_of


@pytest.mark.parametrize("form", ["folder", "model", "checkpoint", "original", "early"])
def test_another_vae_is_baked_in(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, form: str
) -> None:
    """From every form that autoencoders come in, into a folder and into a file."""
    other = tmp_path / "other"
    shutil.copytree(sd1_folder, other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: (2 * t).half() for name, t in load_file(file).items()}, file)
    config = json.loads((other / "vae" / "config.json").read_text(encoding="utf-8"))
    (other / "vae" / "config.json").write_text(
        json.dumps({**config, "scaling_factor": 0.5}), encoding="utf-8"
    )
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    vae = {"folder": other / "vae", "model": other}.get(form, tmp_path / "vae.safetensors")
    prefix = "first_stage_model."
    whole = load_file(export_checkpoint(other, (), tmp_path / "o.safetensors"))
    part = {k.removeprefix(prefix): t for k, t in whole.items() if k.startswith(prefix)}
    if form == "checkpoint":
        save_file(whole, vae)
    elif form == "original":
        save_file({**part, "loss.logvar": torch.zeros(1)}, vae)
    elif form == "early":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(file)
        for new, old in names.items():
            tensors = {
                k.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): t
                for k, t in tensors.items()
            }
        assert any(".query." in key for key in tensors)
        save_file(tensors, vae)
    base = BaseModel(sd1_folder, vae=vae)
    outputs = [export_checkpoint(base, path, tmp_path / f"merged{s}") for s in ("", ".safetensors")]
    for output in outputs:
        report = verify_checkpoint(output, base, path)
        assert report.ok, report.problems
        assert not verify_checkpoint(output, sd1_folder, path).ok
    wanted, found = tensors_of(other), tensors_of(outputs[0])
    names = [name for name in wanted if name.startswith("vae.")]
    assert all(torch.equal(wanted[name], found[name]) for name in names)
    if form in ("folder", "model"):
        written = json.loads((outputs[0] / "vae" / "config.json").read_text(encoding="utf-8"))
        assert written["scaling_factor"] == 0.5
    found = load_file(outputs[1])
    assert all(torch.equal(found[prefix + key], tensor) for key, tensor in part.items())


def test_what_is_not_a_fitting_vae_is_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    with pytest.raises(ExportError, match="not an autoencoder"):
        export_checkpoint(BaseModel(sd1_folder, vae=path), path, tmp_path / "m")
    part = load_file(sd1_folder / "vae" / "diffusion_pytorch_model.safetensors")
    part.pop("quant_conv.bias")
    save_file(part, tmp_path / "v.safetensors")
    with pytest.raises(ExportError, match=r"other shapes than the base's: vae\.quant_conv\.bias"):
        export_checkpoint(
            BaseModel(sd1_folder, vae=tmp_path / "v.safetensors"), path, tmp_path / "m"
        )
    with pytest.raises(ExportError, match="is a pickle"):
        export_checkpoint(BaseModel(sd1_folder, vae="vae.pt"), path, tmp_path / "m")
    assert not (tmp_path / "m").exists()
