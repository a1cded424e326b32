"""Conversions: exact in the program they are for, and honest about the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.cli import main
from dora_diffusion.export import (
    CONVERSIONS,
    ExportError,
    convert_adapter,
    export_checkpoint,
    inspect_adapter,
    verify_checkpoint,
)
from dora_diffusion.families import FAMILIES
from dora_diffusion.formats.adapter import file as adapter_file
from dora_diffusion.formats.adapter.base_targets import approximate, difference, low_rank
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.file import CheckpointFile
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.checkpoint.keys import ModelFacts, plan_checkpoint
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.merge import MergeError, Strengths, merge_tensor
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


def kohya_weights(
    folder: Path, layers: dict[str, LayerWeights]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kohya name (SD1) -> (base weight, merged weight)."""
    pairs = {}
    with PipelineFolder.open(folder) as pipeline:
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            prefix = "lora_unet_" if component == "unet" else "lora_te_"
            weight = pipeline[f"{name}.weight"]
            merged = merge_tensor(weight, [(layer, Strengths())])
            pairs[prefix + path.replace(".", "_")] = (weight, merged)
    return pairs


def comfyui_merge(weight: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """What ComfyUI 0.3.64 computes, in its own order: W + delta, times m / norm."""
    up, down = tensors[f"{prefix}.lora_up.weight"], tensors[f"{prefix}.lora_down.weight"]
    scale = tensors[f"{prefix}.alpha"] / down.shape[0]
    changed = weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    magnitude = tensors[f"{prefix}.dora_scale"]
    if magnitude.shape[0] == weight.shape[0]:
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    else:
        columns = changed.transpose(0, 1).flatten(1).norm(dim=1)
        norm = columns.view(1, -1, *[1] * (weight.ndim - 2))
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))


@pytest.mark.parametrize(
    ("axis", "target"), [("output", "comfyui"), ("input", "kohya"), ("input", "comfyui")]
)
def test_comfyui_computes_the_merge(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str, target: str
) -> None:
    layers = random_adapter(sd1_folder, axis=axis, every=3)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "b", target, base=sd1_folder)
    assert report.errors == {}
    tensors = load_file(report.path)
    for prefix, (weight, merged) in kohya_weights(sd1_folder, layers).items():
        result = comfyui_merge(weight, tensors, prefix)
        torch.testing.assert_close(result, merged, rtol=0, atol=1e-6, msg=prefix)
    if axis == "output":
        with pytest.raises(AdapterFormatError, match="exact in ComfyUI on one base"):
            read_adapter(report.path)
    else:  # exact there as it is, on every base: the same file as `kohya` gives
        kohya = convert_adapter(source, tmp_path / "k", "kohya").path
        report = convert_adapter(source, tmp_path / "c", target)
        assert report.target == "kohya"
        plain = report.path
        assert load_file(plain).keys() == load_file(kohya).keys()
        assert all(torch.equal(t, load_file(kohya)[k]) for k, t in load_file(plain).items())
        assert read_header(plain).metadata["dora_diffusion.target"] == "kohya"
        assert inspect_adapter(plain).tools["A1111"] == "exact"


def test_the_standard_output_axis_is_wrong_in_comfyui(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Why there is a `comfyui` target at all."""
    layers = random_adapter(sd1_folder, every=3)
    file = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    tensors = load_file(file)
    errors = [
        ((comfyui_merge(weight, tensors, prefix) - merged).norm() / (merged - weight).norm()).item()
        for prefix, (weight, merged) in kohya_weights(sd1_folder, layers).items()
    ]
    assert max(errors) > 0.05


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dense_differences_merge_in_lycoris(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str
) -> None:
    from diffusers import UNet2DConditionModel
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    layers = random_adapter(sd1_folder, axis=axis, every=4, components=["unet"])
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "dense.safetensors", "dense", base=sd1_folder)
    unet = UNet2DConditionModel.from_pretrained(sd1_folder / "unet")
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        network, _ = create_lycoris_from_weights(1.0, str(report.path), unet)
    finally:
        LycorisNetwork.LORA_PREFIX = "lycoris"
    assert len(network.loras) == len(layers)
    network.merge_to(1.0)
    with PipelineFolder.open(sd1_folder) as pipeline:
        for name, layer in layers.items():
            expected = merge_tensor(pipeline[f"{name}.weight"], [(layer, Strengths())])
            weight = unet.get_submodule(name.removeprefix("unet.")).weight
            torch.testing.assert_close(weight.data, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 8, 3, 3), (400, 300)])
@pytest.mark.parametrize("rank", [1, 8])
def test_approximations_are_the_best_ones(shape: tuple[int, ...], rank: int) -> None:
    """Against the full decomposition; the large shape takes the randomised way."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator)
    layer = low_rank(target, rank)
    found = (layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).view_as(target)
    singular = torch.linalg.svdvals(target.flatten(1).double())
    best = singular[rank:].norm().item()
    assert layer.weight_shape == shape
    assert best * (1 - 1e-5) <= (target - found).norm().item() <= best * 1.02


def test_approximation_reports_its_error(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis="input", every=6)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(source, tmp_path / "b", "lora-diffusers", base=sd1_folder, rank=6)
    plain = read_adapter(report.path).layers
    assert report.path.name == "pytorch_lora_weights.safetensors"
    with PipelineFolder.open(sd1_folder) as pipeline:
        for name, layer in layers.items():
            wanted = difference(pipeline[f"{name}.weight"], layer)
            got = difference(pipeline[f"{name}.weight"], plain[name])
            error = ((wanted - got).norm() / wanted.norm()).item()
            assert error == pytest.approx(report.errors[name], abs=1e-4), name
    assert report.worst is not None
    assert 0 < report.median_error <= report.worst[1] < 1
    full = convert_adapter(source, tmp_path / "c", "lora", base=sd1_folder, rank=10_000)
    assert full.worst is not None
    assert full.worst[1] < 1e-5


def test_the_command_lists_the_error_of_every_layer(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, every=9)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    command = ["convert", str(source), str(tmp_path / "b"), "--to", "lora", "--rank", "2"]
    assert main([*command, "--base", str(sd1_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["errors"].keys() == layers.keys()
    assert 0 < min(report["errors"].values()) <= report["total_error"] < 1
    assert report["path"] == str(tmp_path / "b" / "adapter_kohya.safetensors")


def test_a_plain_lora_is_approximated_exactly(
    sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis=None, every=6)
    with PipelineFolder.open(sd1_folder) as pipeline:
        _, errors, total = approximate(layers, lambda name: pipeline[f"{name}.weight"], rank=4)
    assert max(errors.values()) < 1e-5
    assert total < 1e-5


def test_refusals_say_what_to_do(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    source = write_adapter(tmp_path / "a", AdapterFile(layers))
    with pytest.raises(ExportError, match="unknown target 'x'; there is diffusers, peft"):
        convert_adapter(source, tmp_path / "b", "x")
    for target in ("comfyui", "dense", "lora", "lora-diffusers"):
        with pytest.raises(ValueError, match="made for one base model"):
            convert_adapter(source, tmp_path / "b", target)
    for rank in (0, -3):
        with pytest.raises(ExportError, match=f"at least 1, got {rank}"):
            convert_adapter(source, tmp_path / "b", "lora", base=sd1_folder, rank=rank)
    for name in ("a.pt", "a.ckpt", "a.bin"):
        with pytest.raises(ExportError, match="pickles are not written"):
            convert_adapter(source, tmp_path / name, "kohya", family="sd1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ExportError, match="is or holds what is read for it"):
        convert_adapter(source, tmp_path / "a", "diffusers")
    convert_adapter(source, tmp_path / "d", "diffusers")
    with pytest.raises(ExportError, match="exists"):
        convert_adapter(source, tmp_path / "d", "diffusers")
    with pytest.raises(AdapterFormatError, match="family is unknown"):
        convert_adapter(source, tmp_path / "b", "kohya")
    assert convert_adapter(source, tmp_path / "b", "kohya", family="sd1").layers == len(layers)
    assert convert_adapter(source, tmp_path / "c", "kohya", base=sd1_folder).path.exists()
    assert set(CONVERSIONS) > {"diffusers", "kohya", "peft"}


def test_the_half_renamed_file_of_diffusers_is_repaired(
    tmp_path: Path,
    sdxl_folder: Path,
    random_adapter: MakeAdapter,
    assert_same_layers: Callable[..., None],
) -> None:
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    layers = random_adapter(sdxl_folder, every=3)
    original = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sdxl")))
    state = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): tensor
        for key, tensor in load_file(original).items()
    }
    broken = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(state))
    assert any("to_q.lora_magnitude_vector" in key for key in broken)
    save_file(
        {key: value.contiguous() for key, value in broken.items()}, tmp_path / "b.safetensors"
    )
    report = inspect_adapter(tmp_path / "b.safetensors")
    assert any("half renamed" in note for note in report.notes)
    fixed = convert_adapter(tmp_path / "b.safetensors", tmp_path / "c", "kohya", base=sdxl_folder)
    assert_same_layers(read_adapter(fixed.path).layers, layers)


def test_the_magnitudes_of_ai_toolkit_are_read(tmp_path: Path) -> None:
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{prefix}.lora_down.weight": torch.randn(2, 8),
            f"{prefix}.lora_up.weight": torch.randn(8, 2),
            f"{prefix}.magnitude": torch.rand(8),
        },
        tmp_path / "a.safetensors",
    )
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert (layer.norm_axis, layer.scale) == ("output", 1.0)
    notes = inspect_adapter(tmp_path / "a.safetensors").notes
    assert any(note.endswith("alpha = rank is assumed") for note in notes)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_inspect(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    layers = random_adapter(sd1_folder)
    facts = AdapterMetadata("sd1", "some/model", "sks dog", 512)
    write_adapter(tmp_path, AdapterFile(layers, facts), target)
    report = inspect_adapter(tmp_path)
    assert report.spelling == target
    assert (report.method, report.norm_axis, report.rank) == ("DoRA", "output", "4")
    assert report.alpha == "3"  # as trained, although the diffusers file holds alpha = rank
    assert report.metadata.trigger == "sks dog"
    assert report.layers["unet"] + report.layers["text_encoder"] == len(layers)
    assert report.kinds["Conv2d 3x3"] > 10
    assert report.kinds["Conv2d 1x1"] > 10
    assert report.parameters == sum(
        t.numel() for layer in layers.values() for t in (layer.down, layer.up, layer.magnitude)
        if t is not None
    )  # fmt: skip
    assert 4 * report.parameters < report.nbytes < 5 * report.parameters
    assert report.notes


def test_inspect_files_for_one_base(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder)
    facts = AdapterMetadata("sd1", "some/model")
    source = write_adapter(tmp_path / "a", AdapterFile(layers, facts))
    whole = inspect_adapter(source)
    for target, method in (("comfyui", "DoRA"), ("dense", "full differences")):
        file = convert_adapter(source, tmp_path / "b", target, base=sd1_folder, overwrite=True).path
        report = inspect_adapter(file)
        assert (report.method, report.rank, report.alpha) == (method, "4", "3")
        assert sum(report.layers.values()) == len(layers)
        assert report.kinds == whole.kinds
        assert report.notes[1] == "for one base model: some/model"
    with pytest.raises(AdapterFormatError, match="full differences"):
        read_adapter(file)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "a.pt", "a.ckpt", "a.pth"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"would run code")
    with pytest.raises(AdapterFormatError, match="is a pickle, which can run code"):
        read_adapter(tmp_path / name)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_base_merges_as_the_folder_does(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    zero = write_adapter(tmp_path / "z", AdapterFile(random_adapter(folder, every=50)))
    base = export_checkpoint(folder, zero, tmp_path / "base.safetensors", strength=0.0)
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(folder, seed=1)))
    seen: list[Any] = []
    merged = export_checkpoint(
        base, file, tmp_path / "merged.safetensors", on_progress=lambda *step: seen.append(step)
    )
    expected = load_file(export_checkpoint(folder, file, tmp_path / "expected.safetensors"))
    actual = load_file(merged)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    size = sum(tensor.nbytes for tensor in expected.values())
    assert seen[-1] == (size, size)
    report = convert_adapter(file, tmp_path / "d", "dense", base=base, family=family)
    assert report.layers == len(read_adapter(file).layers)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_two_plans_are_inverse(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    zero = write_adapter(tmp_path / "z", AdapterFile(random_adapter(folder, every=50)))
    base = export_checkpoint(folder, zero, tmp_path / "base.safetensors", strength=0.0)
    with (
        PipelineFolder.open(folder) as pipeline,
        CheckpointFile.open(base, FAMILIES[family]) as file,
    ):
        configs = {c: pipeline.config(c) for c in ("unet", "vae", "scheduler")}
        names = list(pipeline.specs)
        plan = plan_checkpoint(ModelFacts.from_configs(FAMILIES[family], configs), names)
        assert sorted(file.entries, key=lambda entry: entry.key) == plan
        for name in names:
            assert torch.equal(file[name], pipeline[name]), name


def test_averaged_copies_are_left_out(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    base = export_checkpoint(sd1_folder, file, tmp_path / "base.safetensors")
    tensors = load_file(base) | {"model_ema.decay": torch.ones(1), "other": torch.ones(2)}
    save_file(tensors, base, {"modelspec.title": "kept"})
    merged = export_checkpoint(base, file, tmp_path / "merged.safetensors")
    assert load_file(merged).keys() == tensors.keys() - {"model_ema.decay"}


def test_a_model_is_no_adapter(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Whatever form it has; and not by hundreds of keys that are unknown."""
    with pytest.raises(AdapterFormatError, match="is a model, not an adapter"):
        read_adapter(sd1_folder)
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    single = export_checkpoint(sd1_folder, file, tmp_path / "m.safetensors")
    unet = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    text = sd1_folder / "text_encoder" / "model.safetensors"
    for path in (single, unet, text):
        with pytest.raises(AdapterFormatError, match=r": it is a model, not an adapter: .{9,300}$"):
            read_adapter(path)


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
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=9)))
    with pytest.raises(MergeError, match=r"\.weight: .* not finite in float16; lower the strength"):
        export_checkpoint(
            sd1_folder, path, tmp_path / "m.safetensors", strength=1e6, dtype=torch.float16
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_peft_folder_is_replaced_as_a_whole(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch,
    assert_same_layers: Callable[..., None],
) -> None:  # fmt: skip
    """Neither half of a new adapter is left, nor an old text encoder beside a new UNet."""
    both = random_adapter(sd1_folder, every=5)
    alone = random_adapter(sd1_folder, every=5, components=["unet"], seed=2)
    folder = write_adapter(tmp_path / "p", AdapterFile(both), "peft")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert len(before) == 4
    save, count = adapter_file.save_tensors, 0

    def full_at_the_second(path: Path, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_file, "save_tensors", full_at_the_second)
        for path in (folder, tmp_path / "new"):
            count = 0
            with pytest.raises(DiskFullError, match=r"adapter_model\.safetensors could not"):
                write_adapter(path, AdapterFile(both), "peft")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()
    write_adapter(folder, AdapterFile(alone), "peft")
    assert_same_layers(read_adapter(folder).layers, alone)
