"""CLIP's token embedding: trained, resumed, loaded by Diffusers, merged, proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.config import TrainConfig
from dora_diffusion.export.checkpoint import export_checkpoint
from dora_diffusion.export.derive import combine_adapters
from dora_diffusion.export.verify import verify_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.training.recipe import train
from dora_diffusion.training.trainable.adapters import inject_trained
from tests.training.helpers import make_config

TABLE = "text_encoder.text_model.embeddings.token_embedding"


def settings(folder: Path, photos: Path, output: Path, **kwargs: object) -> TrainConfig:
    return make_config(
        folder,
        photos,
        output,
        targets=["cross-attention"],
        train_text_encoder=True,
        text_encoder_targets=["text-encoder-attention", "token-embedding"],
        **kwargs,
    )


def dense(folder: Path, adapter: Path, name: str) -> tuple[Tensor, Tensor]:
    """The base's table and the adapted one, from the file's tensors in float64."""
    with PipelineFolder.open(folder) as pipeline:
        table = pipeline[f"{name}.weight"].double()
    layer = read_adapter(adapter).layers[name]
    direction = table + layer.scale * (layer.up.double() @ layer.down.double()).t()
    assert layer.magnitude is not None
    return table, layer.magnitude.double() * direction / direction.norm(dim=0)


def loaded(folder: Path, adapter: Path, component: str) -> Tensor:
    """Diffusers' embedding of the table."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    table = getattr(pipeline, component).get_input_embeddings()
    made: Tensor = table(torch.arange(table.weight.shape[0])).detach()
    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_trains_and_every_program_makes_the_same_of_it(
    family: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    run = tmp_path / "run"
    train(settings(folder, photos, run))
    report = report_on(run)
    names = [TABLE] + [TABLE.replace("text_encoder", "text_encoder_2")] * (family == "sdxl")
    assert (report.kinds["Embedding"], report.tools["diffusers"]) == (len(names), "exact")
    merged = {
        "folder": export_checkpoint(folder, run, tmp_path / "merged"),
        "file": export_checkpoint(folder, run, tmp_path / "merged.safetensors"),
    }
    for name in names:
        table, wanted = dense(folder, run, name)
        layer = read_adapter(run).layers[name]
        seen = layer.down.ne(0).any(dim=0)
        assert 0 < seen.sum() < 60 < len(seen) / 8, "only the words of the captions"
        assert (wanted - table).norm() > 1e-4 * table.norm()
        torch.testing.assert_close(
            loaded(folder, run, name.split(".")[0]).double(), wanted, rtol=1e-5, atol=1e-6
        )
        with (
            PipelineFolder.open(merged["folder"]) as model,
            CheckpointFile.open(merged["file"]) as file,
        ):
            for holder in (model, file):
                found = holder[f"{name}.weight"].double()
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for path in merged.values():
        proof = verify_checkpoint(path, folder, run)
        assert proof.ok, proof.problems
        assert proof.kinds["text_encoder Embedding"].tensors == 1


def test_a_combination_is_fitted_as_other_layers_are(
    sd1_folder: Path, photos: Path, tmp_path: Path
) -> None:
    train(settings(sd1_folder, photos, tmp_path / "run"))
    parts = [(tmp_path / "run", 0.5), (tmp_path / "run", 0.25)]
    report = combine_adapters(sd1_folder, parts, tmp_path / "sum.safetensors")
    table, once = dense(sd1_folder, tmp_path / "run", TABLE)
    _, combined = dense(sd1_folder, report.path, TABLE)
    torch.testing.assert_close(combined, table + 0.75 * (once - table), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_axis": "input"}, "kohya's key format has no key for .*token_embedding"),
        ({"text_encoder_targets": ["token-embedding"]}, "Adapt one, write the peft format"),
    ],
)
def test_what_no_file_could_hold_is_refused_before_training(
    sd1_folder: Path, photos: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    config = replace(settings(sd1_folder, photos, tmp_path / "run"), **changes)
    with pytest.raises(AdapterFormatError, match=reason):
        inject_trained(load_components(sd1_folder), config)


def test_trained_tokens_beside_it_are_refused_where_the_table_is_live(
    sd1_folder: Path, tmp_path: Path
) -> None:
    """Transformers would grow the table below the adapter; a merge grows nothing."""
    with PipelineFolder.open(sd1_folder) as pipeline:
        num, dim = pipeline.specs[f"{TABLE}.weight"].shape
    table = LayerWeights(torch.ones(1, num), torch.ones(dim, 1), kind="embedding")
    query = LayerWeights(torch.ones(1, dim), torch.ones(dim, 1))
    layers = {TABLE: table, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": query}
    file = write_adapter(
        tmp_path, AdapterFile(layers, tokens={"<s1>": {"text_encoder": torch.ones(dim)}})
    )
    with pytest.raises(ValueError, match=r"trained token <s1> cannot be added"):
        load_adapted(sd1_folder, file)
    export_checkpoint(sd1_folder, file, tmp_path / "out" / "merged.safetensors")
    assert len(list((tmp_path / "out" / "embeddings").iterdir())) == 1
