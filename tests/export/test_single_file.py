"""Single files: names, markers, positions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint, verify_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    write_adapter,
)
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import LayerWeights
from tests.export.helpers import MakeAdapter


def test_averaged_copies_are_left_out(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    base = export_checkpoint(sd1_folder, file, tmp_path / "base.safetensors")
    tensors = load_file(base) | {"model_ema.decay": torch.ones(1), "other": torch.ones(2)}
    save_file(tensors, base, {"modelspec.title": "kept"})
    merged = export_checkpoint(base, file, tmp_path / "merged.safetensors")
    assert load_file(merged).keys() == tensors.keys() - {"model_ema.decay"}


def test_single_file_keys_are_the_original_ones(
    base: Path, family: str, tmp_path: Path, adapter: tuple[Path, dict[str, LayerWeights]]
) -> None:
    file = export_checkpoint(base, adapter[0], tmp_path / "merged.safetensors")
    with TensorReader(file) as reader:
        shapes = {name: spec.shape for name, spec in reader.specs.items()}
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (32, 32, 1, 1)
    assert shapes["first_stage_model.decoder.up.3.block.0.conv1.weight"][0] == 32
    assert "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight" in shapes
    if family == "sd1":
        assert "model.diffusion_model.output_blocks.2.1.conv.weight" in shapes
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in shapes
        assert len(shapes["model.diffusion_model.input_blocks.1.1.proj_in.weight"]) == 4
        prefix = "cond_stage_model.transformer.text_model."
        assert f"{prefix}encoder.layers.2.self_attn.q_proj.weight" in shapes
    if family == "sd2":
        prefix = "cond_stage_model.model."
        assert shapes[f"{prefix}transformer.resblocks.0.attn.in_proj_weight"] == (192, 64)
        assert f"{prefix}text_projection" not in shapes
    if family == "sdxl":
        assert "model.diffusion_model.label_emb.0.2.bias" in shapes
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in shapes
        prefix = "conditioner.embedders."
        assert f"{prefix}0.transformer.text_model.final_layer_norm.bias" in shapes
        assert shapes[f"{prefix}1.model.text_projection"] == (64, 48)
        assert f"{prefix}1.model.transformer.resblocks.2.mlp.c_proj.bias" in shapes


@pytest.mark.parametrize(("family", "prefix"), [("sd1", ""), ("sdxl", "text_model.text_model.")])
def test_text_encoders_with_a_wrong_prefix(
    tmp_path: Path, family: str, prefix: str, request: pytest.FixtureRequest,
    random_adapter: MakeAdapter,
) -> None:  # fmt: skip
    """A base whose CLIP lacks `text_model.`, or has it twice: read, and written with it, once."""
    import diffusers

    folder = request.getfixturevalue(f"{family}_folder")
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(folder, every=7)))
    good = export_checkpoint(folder, path, tmp_path / "good.safetensors", strength=0.0)
    tensors, place = load_file(good), {"sd1": "cond_stage_model", "sdxl": "conditioner.embedders.0"}
    right = f"{place[family]}.transformer.text_model."
    tensors[f"{right}embeddings.position_ids"] = torch.arange(77)[None]
    wrong = tmp_path / "wrong.safetensors"
    replaced = right.replace("text_model.", prefix)
    save_file({key.replace(right, replaced): t for key, t in tensors.items()}, wrong)
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    file = base / "text_encoder" / "model.safetensors"
    state = {key.removeprefix("text_model."): t for key, t in load_file(file).items()}
    save_file({prefix + key: t for key, t in state.items()}, file, {"format": "pt"})
    expected = load_file(export_checkpoint(folder, path, tmp_path / "expected.safetensors"))
    for number, source in enumerate((wrong, base)):
        output = export_checkpoint(source, path, tmp_path / f"{number}.safetensors")
        merged = load_file(output)
        merged.pop(f"{right}embeddings.position_ids", None)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[key], t) for key, t in expected.items())
        assert verify_checkpoint(output, source, path).ok
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_single_file(
        str(tmp_path / "0.safetensors"), config=str(folder), local_files_only=True
    )
    found = dict(pipeline.text_encoder.named_parameters())
    for key, tensor in found.items():
        key = key.removeprefix("text_model.")
        assert torch.equal(tensor, expected[right + key])
    loaded = load_components(BaseModel(wrong, model_config=folder)).text_encoders[0]
    plain = load_components(BaseModel(good, model_config=folder)).text_encoders[0].state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in loaded.state_dict().items())
