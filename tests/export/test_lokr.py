"""LoKr files through inspect, convert, export, verify and generation, on whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.cli.main import main
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import (
    convert_adapter,
    export_checkpoint,
    inspect_adapter,
    verify_checkpoint,
)
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.formats.names.kohya import kohya_name
from dora_diffusion.formats.names.modules import USUAL_LAYOUT, known_layout
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.load import load_adapted
from tests.anima import write_anima
from tests.conftest import is_adaptable
from tests.export.helpers import tensors_of
from tests.flux2_klein import write_flux2_klein
from tests.formats.layouts.lokr_files import changed, error, lokr, save
from tests.z_image import write_z_image

FACTORS = [("whole", "whole"), ("low", "low"), ("whole", "low"), ("low", "whole")]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A LoKr file with LoRA layers for a model, and the weights that it means."""

    folder: Path
    path: Path
    axis: str | None
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]
    keys: dict[str, str]
    numbers: int

    def error(self, weights: dict[str, Tensor]) -> float:
        """Largest error of any layer, relative to its largest weight."""
        return max(error(weights[name], wanted) for name, wanted in self.expected.items())

    def distance(self, weights: dict[str, Tensor]) -> float:
        """Distance of the weights, relative to that of the base."""
        left, size = (
            sum((some[name] - wanted).square().sum() for name, wanted in self.expected.items())
            for some in (weights, self.weights)
        )
        return float((left / size) ** 0.5)

    def read(self, path: Path) -> dict[str, Tensor]:
        """Weights with an adapter merged into them."""
        with PipelineFolder.open(self.folder) as base:
            layers = read_adapter(path, base).layers
        assert layers.keys() == self.expected.keys()
        return {n: merge_tensor(self.weights[n], [(layers[n], Strengths())]) for n in layers}


def lora(weight: Tensor) -> dict[str, Tensor]:
    down, up = torch.randn(1, *weight.shape[1:]), torch.randn(len(weight), 1)
    up = up.view(*up.shape, *[1] * (weight.ndim - 2))
    return {"lora_down.weight": down, "lora_up.weight": 0.1 * up, "alpha": torch.tensor(2.0)}


@pytest.fixture(params=[("sd1", None), ("sd1", "output"), ("sd2", "input"), ("sdxl", "output")],
                ids=str)  # fmt: skip
def case(request: pytest.FixtureRequest, tmp_path: Path, shallow: Any) -> Case:
    family, axis = request.param
    expected, stored, keys = {}, {}, {}
    with PipelineFolder.open(shallow(family)) as pipeline:
        shapes = module_shapes(pipeline)
        names = sorted(name for name in shapes if is_adaptable(name, COMPONENTS))[::4]
        weights = {name: pipeline[f"{name}.weight"] for name in names}
        layout = known_layout(shapes)
    for index, (name, weight) in enumerate(weights.items()):
        w1, w2 = FACTORS[index % 4]
        if weight.ndim == 4 and weight.shape[2] > 1 and index % 3:
            w2 = "tucker"
        if index % 5 == 4:
            file = lora(weight)
            change = 2 * file["lora_up.weight"].flatten(1) @ file["lora_down.weight"].flatten(1)
            expected[name] = weight.double() + change.view_as(weight)
        else:
            file = lokr(weight, w1, w2, axis=axis, seed=index, size=0.3)
            expected[name] = changed(weight, file)
        keys[name] = str(kohya_name(name, FAMILIES[family], layout or USUAL_LAYOUT))
        stored[keys[name]] = file
    assert len(stored) == len(weights)
    path = save(tmp_path / "lokr.safetensors", stored)
    numbers = sum(t.numel() for file in stored.values() for k, t in file.items() if k != "alpha")
    return Case(shallow(family), path, axis, weights, expected, keys, numbers)


def test_a_merged_model_is_the_live_one_and_that_of_the_formula(tmp_path: Path, case: Case) -> None:
    merged = export_checkpoint(case.folder, case.path, tmp_path / "merged")
    tensors = tensors_of(merged)
    assert case.error({name: tensors[f"{name}.weight"] for name in case.expected}) < TOLERANCE
    assert verify_checkpoint(merged, case.folder, case.path).ok
    live, _ = load_adapted(case.folder, case.path)
    models = [live, load_components(merged), load_components(case.folder)]
    with torch.no_grad():
        ids = torch.arange(77)[None]
        encoded = [m.text_encoders[0](ids)[0] for m in models]
    assert error(encoded[0], encoded[1].double()) < 1e-4
    assert error(encoded[2], encoded[1].double()) > 1e-3
    predicted = [denoise(m.denoiser) for m in models]
    assert error(predicted[0], predicted[1].double()) < 1e-4
    assert error(predicted[2], predicted[1].double()) > 1e-3


def denoise(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    added, config = {}, unet.config
    if config.addition_embed_type:
        added = {
            "text_embeds": torch.randn(1, 48, generator=generator),
            "time_ids": torch.ones(1, 6),
        }
    context = torch.randn(1, 7, config.cross_attention_dim, generator=generator)
    sample = torch.randn(1, config.in_channels, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(sample, 7, context, added_cond_kwargs=added).sample


def test_it_is_converted(tmp_path: Path, case: Case) -> None:
    """Exactly to differences and to the same method, or with the error that is stated."""
    dense = convert_adapter(case.path, tmp_path / "d.safetensors", "dense", base=case.folder)
    differences = load_file(dense.path)
    added = {n: case.weights[n] + differences[f"{key}.diff"] for n, key in case.keys.items()}
    assert case.error(added) < TOLERANCE
    exact = "kohya" if case.axis else "diffusers"  # LoRA and DoRA layers do not mix in diffusers.
    whole = convert_adapter(case.path, tmp_path / "w.safetensors", exact, base=case.folder)
    assert case.error(case.read(whole.path)) < TOLERANCE
    fit = FitSettings(rank=4)
    for target in ("lora", "smaller-rank"):
        path = tmp_path / f"{target}.safetensors"
        report = convert_adapter(case.path, path, target, fit, base=case.folder)
        assert 0.01 < report.total_error < 1
        assert case.distance(case.read(path)) == pytest.approx(report.total_error, rel=1e-3)
        axis = "" if target == "lora" else case.axis or "output"
        assert inspect_adapter(path).norm_axis == axis
    assert max(layer.rank for layer in read_adapter(path).layers.values()) == 4


def test_it_is_inspected(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_adapter(case.path, case.folder)
    assert report.key_format == "lokr"
    assert report.method == ("LoKr, read as DoRA and LoRA" if case.axis else "LoKr, read as LoRA")
    assert report.norm_axis == (case.axis or "")
    assert report.parameters == case.numbers
    assert report.fits == f"yes, all {len(case.expected)} layers"
    comfyui = report.tools["ComfyUI and Forge"].partition(":")[0]
    assert comfyui == ("wrong" if case.axis == "output" else "exact")
    assert report.tools["sd-scripts"].startswith("convert: ")
    assert main(["inspect", str(case.path), "--base", str(case.folder)]) == 0
    assert "LoKr, read as" in capsys.readouterr().out


def transformer_case(folder: Path, write: Callable[[Path], Path]) -> dict[str, Tensor]:
    with PipelineFolder.open(write(folder)) as pipeline:
        return {n: pipeline[f"{n}.weight"] for n, shape in module_shapes(pipeline).items()
                if n.startswith("transformer.") and len(shape) == 2}  # fmt: skip


@pytest.mark.parametrize("axis", [None, "output"])
def test_joined_projections_of_z_image(tmp_path: Path, axis: str | None) -> None:
    """By ComfyUI's names; the live model is the merged one."""
    weights = transformer_case(folder := tmp_path / "model", write_z_image)
    block = "transformer.layers.1.attention"
    parts = [f"{block}.to_{part}" for part in "qkv"]
    joined = torch.cat([weights[part] for part in parts])
    out = f"{block}.to_out.0"
    stored = {"qkv": lokr(joined, axis=axis, size=0.3), "out": lokr(weights[out], "low", axis=axis)}
    names = {f"diffusion_model.layers.1.attention.{leaf}": file for leaf, file in stored.items()}
    path = save(tmp_path / "lokr.safetensors", names)
    merged = export_checkpoint(folder, path, tmp_path / "merged")
    tensors = tensors_of(merged)
    expected = dict(zip(parts, changed(joined, stored["qkv"]).chunk(3), strict=True))
    expected[out] = changed(weights[out], stored["out"])
    live = load_adapted(folder, path)[0].denoiser
    inputs = torch.randn(2, 48)
    for name, wanted in expected.items():
        assert error(weights[name], wanted) > 0.01
        assert error(tensors[f"{name}.weight"], wanted) < TOLERANCE
        layer = live.get_submodule(name.removeprefix("transformer."))
        with torch.no_grad():
            assert error(layer(inputs), inputs.double() @ wanted.t()) < 1e-5
    tools = inspect_adapter(path).tools
    assert tools["A1111"] == "no: it loads no transformers of this kind"
    assert tools["ComfyUI and Forge"].startswith("wrong" if axis else "exact")
    small = convert_adapter(path, tmp_path / "s", "smaller-rank", FitSettings(rank=2), base=folder)
    assert 0.01 < small.total_error < 1


@pytest.mark.parametrize("form", ["transformer.{}", "lycoris_{}", "diffusion_model.{}"])
def test_names_of_flux2_klein(tmp_path: Path, form: str) -> None:
    weights = transformer_case(folder := tmp_path / "model", write_flux2_klein)
    files = {name: lokr(weight, "low", "low") for name, weight in sorted(weights.items())[::5]}
    paths = {name: name.removeprefix("transformer.") for name in files}
    if "_{" in form:
        paths = {name: path.replace(".", "_") for name, path in paths.items()}
    stored = {form.format(paths[name]): file for name, file in files.items()}
    merged = export_checkpoint(
        folder, save(tmp_path / "lokr.safetensors", stored), tmp_path / "merged"
    )
    tensors = tensors_of(merged)
    for name, file in files.items():
        assert error(tensors[f"{name}.weight"], changed(weights[name], file)) < TOLERANCE


ANIMA = {
    "transformer_blocks.1.attn1.to_q": "blocks.1.self_attn.q_proj",
    "transformer_blocks.0.attn2.to_out.0": "blocks.0.cross_attn.output_proj",
    "transformer_blocks.0.ff.net.2": "blocks.0.mlp.layer2",
    "transformer_blocks.1.norm2.linear_1": "blocks.1.adaln_modulation_cross_attn.1",
    "patch_embed.proj": "x_embedder.proj.1",
}  # fmt: skip


@pytest.mark.parametrize("axis", [None, "output", "input"])
@pytest.mark.parametrize("form", ["diffusion_model.{}", "lora_unet_{}", "lycoris_{}"])
def test_names_of_anima(tmp_path: Path, form: str, axis: str | None) -> None:
    """With original names, or Diffusers' with LyCORIS' prefix."""
    weights = transformer_case(folder := tmp_path / "model", write_anima)
    files, stored = {}, {}
    for path, original in ANIMA.items():
        name = f"transformer.{path}"
        files[name] = lokr(weights[name], axis=axis, size=0.3)
        stored_path = path if "lycoris" in form else original
        flat = stored_path if "." in form else stored_path.replace(".", "_")
        stored[form.format(flat)] = files[name]
    path = save(tmp_path / "lokr.safetensors", stored)
    tensors = tensors_of(export_checkpoint(folder, path, tmp_path / "merged"))
    for name, file in files.items():
        assert error(weights[name], changed(weights[name], file)) > 0.01
        assert error(tensors[f"{name}.weight"], changed(weights[name], file)) < TOLERANCE
