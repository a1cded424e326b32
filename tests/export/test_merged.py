"""The check of a written merge: it refuses what is wrong, and nothing that is right."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import UnsupportedModelError
from dora_diffusion.export import ExportError, convert_adapter, export_checkpoint, verify_checkpoint
from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.checkpoint.weights import Entry
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.stream import (
    TensorReader,
    TensorSpec,
    save_tensors,
    write_tensors,
)
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics import merging
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.merging import WeightedAdapter
from dora_diffusion.numerics.weights import LayerWeights, MergeError, NormAxis, Strengths

# On 2 threads, MKL computes the last block of the first one with another kernel than on 1.
SHAPES = {
    "unet.conv": (320, 640, 3, 3),
    "unet.linear": (640, 333),
    "unet.other": (640, 333),
    "unet.q": (64, 40),
    "unet.k": (64, 40),
}


ENTRIES = [
    Entry("conv", ("unet.conv.weight",)),
    Entry("linear", ("unet.linear.weight",)),
    Entry("other", ("unet.other.weight",)),
    Entry("in_proj", ("unet.q.weight", "unet.k.weight"), "concatenate"),
    Entry("bias", ("unet.conv.bias",)),
]


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Weights(dict[str, Tensor]):
    """A base model in memory."""

    family = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}


def layer_for(weight: Tensor, generator: torch.Generator, axis: NormAxis) -> LayerWeights:
    out, into, *kernel = weight.shape
    down = torch.randn(4, into, *kernel, generator=generator) / 30
    up = torch.randn(out, 4, *[1] * len(kernel), generator=generator) / 30
    norm = weight_norm(weight, axis)
    return LayerWeights(down, up, norm * 1.02, 4.0, axis)


def make_model(dtype: torch.dtype, axis: NormAxis = "output", strength: float = 0.8) -> MergedModel:
    generator = torch.Generator().manual_seed(0)
    base = Weights({"unet.conv.bias": torch.zeros(320)})
    layers = {}
    for name, shape in SHAPES.items():
        base[f"{name}.weight"] = torch.randn(shape, generator=generator) / 30
        layers[name] = layer_for(base[f"{name}.weight"], generator, axis)
    return MergedModel(base, [WeightedAdapter(layers, Strengths(strength))], dtype)


def tensors(model: MergedModel) -> dict[str, Tensor]:
    return {entry.key: model.build(entry) for entry in ENTRIES}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def written(request: pytest.FixtureRequest) -> tuple[MergedModel, dict[str, Tensor]]:
    """A model, and what a file of it holds."""
    model = make_model(request.param)
    return model, tensors(model)


def write_and_check(folder: Path) -> None:
    """Write models as exports do, in workers, and check them on 1, 2 and 4 threads."""
    keys = {entry.key: entry for entry in ENTRIES}
    axes: tuple[NormAxis, ...] = ("output", "input")
    for axis, threads in itertools.product(axes, (1, 2, 4)):
        torch.set_num_threads(threads)
        model = make_model(torch.float32, axis)
        specs = {key: TensorSpec.of(model.build(entry)) for key, entry in keys.items()}
        path = write_tensors(folder / "m.safetensors", specs, lambda k, m=model: m.build(keys[k]))
        check_sample(path, ENTRIES, model)
        assert torch.get_num_threads() == threads
        with TensorReader(path) as reader:
            for key, entry in keys.items():
                assert torch.equal(reader[key], model.build(entry)), (key, axis, threads)


def test_what_workers_wrote_is_accepted_on_any_number_of_threads(tmp_path: Path) -> None:
    """As users have it: without MKL's reproducible mode, which the other tests run in."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True)


def in_another_order(weight: Tensor, layers: merging.Layers, dtype: torch.dtype) -> Tensor:
    """A merge as a BLAS of another order would do it: ranks backwards, in two halves."""
    base = weight.float()
    total = base.clone()
    for layer, strengths in layers:
        down, up = layer.down.flatten(1).flip(0), layer.up.flatten(1).flip(1)
        parts = [layer.scale * (up[:, i::2] @ down[i::2]) for i in range(2)]
        direction = (parts[0] + parts[1]).view_as(base) + base
        if layer.magnitude is not None:
            dims = [d for d in range(base.ndim) if d != (layer.norm_axis == "input")]
            norm = direction.flip(1).square().sum(dims, keepdim=True).sqrt()
            direction = direction * (layer.magnitude.view_as(norm) / norm)
        total = total + strengths.strength * (direction - base)
    return total.to(dtype)


def test_a_merge_of_other_last_bits_is_accepted(
    written: tuple[MergedModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, found = written
    layers, strengths = model.adapters[0].layers, model.adapters[0].strengths
    for name in ("conv", "linear"):
        key = f"unet.{name}"
        other = in_another_order(
            model.base[f"{key}.weight"], [(layers[key], strengths)], found[name].dtype
        )
        assert not torch.equal(other, found[name])
        found = {**found, name: other}
    check_sample(save_tensors(tmp_path / "m.safetensors", found), ENTRIES, model)


def swapped(tensors: dict[str, Tensor]) -> None:
    tensors["linear"], tensors["other"] = tensors["other"], tensors["linear"]


def one_bit(tensors: dict[str, Tensor]) -> None:
    """The lowest bit of the exponent, or a high one of the mantissa, of one number."""
    flat = tensors["linear"].view(-1).view(torch.uint8)
    flat[len(flat) // 2 + tensors["linear"].element_size() - 1] ^= 1


def zeros_at_the_end(tensors: dict[str, Tensor]) -> None:
    tensors["in_proj"][-1, -20:] = 0


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["conv"][0, 0, 0, 0] = torch.nan


def parts_in_another_order(tensors: dict[str, Tensor]) -> None:
    tensors["in_proj"] = torch.cat(tensors["in_proj"].chunk(2)[::-1])


@pytest.mark.parametrize(
    "damage", [swapped, one_bit, zeros_at_the_end, not_a_number, parts_in_another_order]
)
def test_damage_is_refused(
    written: tuple[MergedModel, dict[str, Tensor]],
    damage: Callable[[dict[str, Tensor]], None],
    tmp_path: Path,
) -> None:
    model, found = written
    found = {name: tensor.clone() for name, tensor in found.items()}
    path = save_tensors(tmp_path / "m.safetensors", found)
    check_sample(path, ENTRIES, model)
    damage(found)
    path = save_tensors(tmp_path / "m.safetensors", found)
    with pytest.raises(ExportError, match=r"m\.safetensors: \w+ did not read back as it was"):
        check_sample(path, ENTRIES, model)


MakeAdapter = Callable[..., dict[str, LayerWeights]]


def codes_of(kind: str, key: str, weight: Tensor) -> dict[str, Tensor]:
    """A quantised weight as programs store it."""
    name, codes = key.removesuffix(".weight"), weight.to(torch.int8)
    if kind == "bitsandbytes nf4":
        halves = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
        state = torch.zeros(80, dtype=torch.uint8)
        return {
            key: halves,
            f"{key}.absmax": torch.zeros(1, dtype=torch.uint8),
            f"{key}.quant_state.bitsandbytes__nf4": state,
        }
    if kind == "bitsandbytes int8":
        return {key: codes, f"{name}.SCB": torch.ones(len(weight))}
    if kind == "quanto":
        return {f"{key}._data": codes, f"{key}._scale": torch.ones(len(weight), 1)}
    scaled = {key: weight.to(torch.float8_e4m3fn), f"{name}.scale_weight": torch.ones(1)}
    return scaled if kind == "scaled float8" else {key: codes}


KINDS = ("codes alone", "bitsandbytes nf4", "bitsandbytes int8", "quanto", "scaled float8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_a_base_that_is_given_quantised_is_refused(
    kind: str, is_file: bool, tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    base = tmp_path / "base"
    if is_file:
        base = export_checkpoint(sd1_folder, (), tmp_path / "base.safetensors")
    else:
        shutil.copytree(sd1_folder, base)
    file = base if is_file else base / "unet" / "diffusion_pytorch_model.safetensors"
    stored: dict[str, Tensor] = {}
    for key, tensor in load_file(file).items():
        is_layer = key.endswith("weight") and "attn" in key and tensor.ndim == 2
        is_layer = is_layer and not key.startswith("cond_stage_model")
        stored |= codes_of(kind, key, tensor) if is_layer else {key: tensor}
    save_file(stored, file)
    options = {"model_config": sd1_folder} if is_file else {}
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(.*\); take .*--quantize"):
        load_components(BaseModel(base, **options))
    layers = random_adapter(sd1_folder, every=1)
    path = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    with pytest.raises(MergeError, match=r"the base stores .*attn.* in half precision"):
        export_checkpoint(base, path, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_bases_are_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, dtype: torch.dtype
) -> None:
    """They mean something only with their scales; and 8 bits would round an adapter away."""
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: t.to(dtype) if t.ndim == 2 else t for k, t in load_file(file).items()}, file)
    path = write_adapter(
        tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=9), AdapterMetadata("sd1"))
    )
    kind = str(dtype).removeprefix("torch.")
    for name in ("m", "m.safetensors"):
        with pytest.raises(MergeError, match=rf"the base stores unet\..* as {kind}"):
            export_checkpoint(base, path, tmp_path / name)
    for target in ("dense", "lora", "comfyui"):
        with pytest.raises(MergeError, match=f"as {kind}.*half precision"):
            convert_adapter(path, tmp_path / "c", target, base=base)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "base"}
    merged = export_checkpoint(sd1_folder, path, tmp_path / "m")
    shutil.copy(file, merged / "unet" / file.name)
    problems = verify_checkpoint(merged, sd1_folder, path).problems
    assert any("times the rounding" in one or "not floating-point" in one for one in problems)


def test_a_merge_beyond_the_dtype_says_where(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = {
        name: dataclasses.replace(layer, magnitude=layer.magnitude * 1e6)
        for name, layer in random_adapter(sd1_folder, every=9).items()
        if layer.magnitude is not None
    }
    path = write_adapter(tmp_path / "a", AdapterFile(layers))
    with pytest.raises(MergeError, match=r"\.weight: .* not finite in float16; lower the strength"):
        export_checkpoint(sd1_folder, path, tmp_path / "m.safetensors", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_that_reads_back_wrong_is_not_kept(
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_adapter: MakeAdapter,
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    write_one = safetensors_stream._write_one

    def corrupt(stream: Any, key: str, spec: Any, tensor: Tensor) -> None:
        write_one(stream, key, spec, tensor + 1 if tensor.is_floating_point() else tensor)

    monkeypatch.setattr(safetensors_stream, "_write_one", corrupt)
    with pytest.raises(ExportError, match="did not read back"):
        export_checkpoint(sd1_folder, file, tmp_path / "merged.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


if __name__ == "__main__":
    write_and_check(Path(sys.argv[1]))
