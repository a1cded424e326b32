"""The check of a written merge: it refuses what is wrong, and nothing that is right."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.export import ExportError
from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.formats.checkpoint.keys import Entry
from dora_diffusion.formats.files.stream import (
    TensorReader,
    TensorSpec,
    save_tensors,
    write_tensors,
)
from dora_diffusion.merge import Strengths, WeightedAdapter
from dora_diffusion.numerics import merging
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

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

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        return SHAPES


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.0, 0.79, 0.81, 1.0])
def test_another_strength_is_refused(dtype: torch.dtype, strength: float, tmp_path: Path) -> None:
    model = make_model(dtype, strength=0.8)
    other = tensors(make_model(dtype, strength=strength))
    for entry in ENTRIES[:4]:
        assert not model.explains(entry, other[entry.key])
        assert model.explains(entry, model.build(entry))


if __name__ == "__main__":
    write_and_check(Path(sys.argv[1]))
