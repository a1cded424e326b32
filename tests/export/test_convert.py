"""Conversions: exact ones, approximations with their error, and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.cli.main import main
from dora_diffusion.config import ConfigError
from dora_diffusion.export import (
    ExportError,
    convert_adapter,
    export_checkpoint,
    inspect_adapter,
)
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS, TARGETS
from dora_diffusion.numerics.dora import weight_change
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths
from tests.export.helpers import MakeAdapter
from tests.formats.layouts.helpers import (
    weights_of,
)
from tests.formats.layouts.test_compatibility import a1111, comfyui, meant, plain_lora


def test_approximation_reports_its_error(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis="input", every=6)
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")), "kohya")
    report = convert_adapter(
        source, tmp_path / "b", "lora-diffusers", FitSettings(rank=6), base=sd1_folder
    )
    plain = read_adapter(report.path).layers
    assert report.path.name == "pytorch_lora_weights.safetensors"
    with PipelineFolder.open(sd1_folder) as pipeline:
        for name, layer in layers.items():
            wanted = weight_change(pipeline[f"{name}.weight"], layer)
            got = weight_change(pipeline[f"{name}.weight"], plain[name])
            error = ((wanted - got).norm() / wanted.norm()).item()
            assert error == pytest.approx(report.errors[name], abs=1e-4), name
    assert report.worst is not None
    assert 0 < report.median_error <= report.worst[1] < 1
    full = convert_adapter(
        source, tmp_path / "c", "lora", FitSettings(rank=10_000), base=sd1_folder
    )
    assert full.worst is not None
    assert full.worst[1] < 1e-5
    assert inspect_adapter(full.path).tools["LyCORIS"] == EXACT_IN_LYCORIS


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


def test_refusals_say_what_to_do(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    source = write_adapter(tmp_path / "a", AdapterFile(layers))
    with pytest.raises(ExportError, match="unknown target 'x'; there is comfyui, forge, a1111"):
        convert_adapter(source, tmp_path / "b", "x")
    for target in ("comfyui", "dense", "lora", "lora-diffusers"):
        with pytest.raises(
            ValueError,
            match=r"made for one base model.* with --base(, or write comfyui_pair for any base)?$",
        ):
            convert_adapter(source, tmp_path / "b", target)
    metadata = AdapterMetadata(base_model="org/model")
    named = write_adapter(tmp_path / "named", AdapterFile(layers, metadata))
    with pytest.raises(ValueError, match=r"with --base \(it was trained on org/model\)$"):
        convert_adapter(named, tmp_path / "b", "a1111")
    with pytest.raises(ConfigError, match="rank is 0; it must be at least 1"):
        convert_adapter(source, tmp_path / "b", "lora", FitSettings(rank=0), base=sd1_folder)
    with pytest.raises(
        ExportError, match="fit is nearest LoRA, sum of the ranks; convert keeps the"
    ):
        convert_adapter(source, tmp_path / "b", "lora", FitSettings(method="lora"))
    for name in ("a.pt", "a.ckpt", "a.bin"):
        with pytest.raises(ExportError, match="pickles are not written"):
            convert_adapter(source, tmp_path / name, "kohya", family="sd1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "named"]
    with pytest.raises(ExportError, match="contains the input"):
        convert_adapter(source, tmp_path / "a", "diffusers")
    convert_adapter(source, tmp_path / "d", "diffusers")
    with pytest.raises(ExportError, match="exists"):
        convert_adapter(source, tmp_path / "d", "diffusers")
    with pytest.raises(AdapterFormatError, match="family is unknown"):
        convert_adapter(source, tmp_path / "b", "kohya")
    assert convert_adapter(source, tmp_path / "b", "kohya", family="sd1").layers == len(layers)
    assert convert_adapter(source, tmp_path / "c", "kohya", base=sd1_folder).path.exists()
    assert set(CONVERSIONS) > {"diffusers", "kohya", "peft"}


EXACT_IN_LYCORIS = (
    'exact: with LycorisNetwork.LORA_PREFIX = "lora_unet", without which it finds no layer'
)


def total_error(folder: Path, layers: dict[str, LayerWeights], file: Path) -> float:
    """Distance of all merged weights of a kohya LoRA from the DoRA's, relative to the change."""
    tensors, left, size = load_file(file), 0.0, 0.0
    with PipelineFolder.open(folder) as pipeline:
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
            key = prefix + path.replace(".", "_")
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            scale = tensors[f"{key}.alpha"].item() / down.shape[0]
            wanted = weight_change(pipeline[f"{name}.weight"], layer)
            found = scale * (up.flatten(1) @ down.flatten(1)).view_as(wanted)
            left += (wanted - found).square().sum().item()
            size += wanted.square().sum().item()
    return float((left / size) ** 0.5)


@pytest.mark.parametrize("target", ["lora", "lora-diffusers"])
def test_an_approximation_is_called_exact_for_itself_only(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, dora: Path, target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By one sentence with its error, in `convert` and in `inspect`; of any rank it is told."""
    path = tmp_path / "lora.safetensors"
    command = ["convert", str(dora), str(path), "--to", target, "--base", str(sd1_folder)]
    assert main([*command, "--rank", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = convert_adapter(
        dora, path, target, FitSettings(rank=5), base=sd1_folder, overwrite=True
    )
    if target == "lora":
        measured = total_error(sd1_folder, random_adapter(sd1_folder, every=9), path)
        assert report.total_error == pytest.approx(measured, rel=1e-3)
    assert 0.01 < report.total_error < 1
    sentence = f"exact for this LoRA, which is off the DoRA by {report.total_error:.1%}"
    assert any(line.startswith(f"{sentence}: diffusers") for line in lines)
    assert not any(line.startswith("exact:") for line in lines)
    tools = inspect_adapter(path).tools
    older = ": in 0.42; 0.35 leaves 1 layer (unet.conv_in) unchanged, or refuses SDXL's"
    assert tools["diffusers"] == sentence + (older if target == "lora" else "")
    assert "exact" not in tools.values()
    assert main(["inspect", str(path)]) == 0
    assert f"diffusers {sentence}" in " ".join(capsys.readouterr().out.split())
    # Again: what is lost adds up, and is still told of the DoRA.
    again = convert_adapter(
        path, tmp_path / "b.safetensors", target, FitSettings(rank=3), base=sd1_folder
    )
    most = report.total_error + again.total_error * (1 + report.total_error)
    verdict = inspect_adapter(again.path).tools["LyCORIS" if target == "lora" else "diffusers"]
    if target == "lora":
        verdict, _, how = verdict.partition(": ")
        assert f"exact: {how}" == EXACT_IN_LYCORIS
    start, _, percent = verdict.rpartition(" ")
    assert start == "exact for this LoRA, which is off the DoRA by"
    # The file holds the error of the first conversion in fewer digits.
    assert float(percent.rstrip("%")) == pytest.approx(100 * most, abs=0.1)


def test_the_rank_of_an_approximation_stands_beside_its_own_alpha(
    tmp_path: Path, sd1_folder: Path, dora: Path
) -> None:
    assert inspect_adapter(dora).alpha == "3"
    report = convert_adapter(
        dora, tmp_path / "a", "lora-diffusers", FitSettings(rank=5), base=sd1_folder
    )
    found = inspect_adapter(report.path)
    ranks = found.to_dict()["rank"]
    ranks = set(ranks.values()) if isinstance(ranks, dict) else {ranks}
    assert max(ranks) == 5
    assert found.to_dict()["alpha"] == found.to_dict()["rank"]
    # Files of before held the DoRA's alpha.
    with PipelineFolder.open(sd1_folder):
        tensors = load_file(report.path)
    save_file(
        tensors,
        report.path,
        {"dora_diffusion.approximation": "singular values, rank 5", "dora_diffusion.alpha": "3",
         "dora_diffusion.target": "diffusers", "dora_diffusion.family": "sd1"},
    )  # fmt: skip
    assert inspect_adapter(report.path).to_dict()["alpha"] != 3


def test_what_is_read_is_not_replaced(
    tmp_path: Path, sd1_folder: Path, dora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By no name of it: itself, its folder, or a link."""
    before = dora.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(dora)
    for source, output in ((dora, dora), (dora.parent, dora), (dora, dora.parent), (dora, link)):
        command = ["convert", str(source), str(output), "--to", "diffusers", "--overwrite"]
        assert main(command) == 1
        assert "contains the input" in capsys.readouterr().err
    base = tmp_path / "base.safetensors"
    export_checkpoint(sd1_folder, dora, base)
    size = base.stat().st_size
    with pytest.raises(ExportError, match="contains the input"):
        convert_adapter(dora, base, "kohya", base=base, overwrite=True)
    assert (dora.read_bytes(), base.stat().st_size) == (before, size)
    peft = convert_adapter(dora, tmp_path / "peft", "peft").path
    with pytest.raises(ExportError, match="contains the input"):
        convert_adapter(peft / "unet", peft, "peft", overwrite=True)
    assert (peft / "text_encoder").is_dir()
    convert_adapter(dora, dora.parent, "kohya")  # another file of the same folder


# What each program makes of a file in kohya's names: formulas of their sources, written apart.
COMPUTED_BY = {
    "comfyui": [comfyui], "forge": [comfyui], "a1111": [a1111], "invokeai": [a1111],
    "sd-scripts": [plain_lora], "civitai": [comfyui, a1111],
}  # fmt: skip
AXES = {
    "LoRA": (None,), "output": ("output",), "input": ("input",), "mixed": ("output", "input", None),
}  # fmt: skip


@pytest.fixture(params=AXES)
def of_axes(
    request: pytest.FixtureRequest, tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> tuple[Path, dict[str, LayerWeights]]:
    """A kohya file whose layers have magnitudes on these axes in turn."""
    axes = AXES[request.param]
    kinds = [random_adapter(sd1_folder, axis=axis or "output", every=7) for axis in axes]
    layers = {}
    for number, name in enumerate(kinds[0]):
        layer, axis = kinds[number % len(axes)][name], axes[number % len(axes)]
        layers[name] = layer if axis else dataclasses.replace(layer, magnitude=None)
    path = tmp_path / "source.safetensors"
    return write_adapter(path, AdapterFile(layers, AdapterMetadata("sd1")), "kohya"), layers


def parts_by_layer(file: Path, layers: dict[str, LayerWeights]) -> dict[str, dict[str, Tensor]]:
    tensors, found = load_file(file), {}
    for name in layers:
        component, _, path = name.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
        start = prefix + path.replace(".", "_") + "."
        found[name] = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    return found


@pytest.mark.parametrize("program", COMPUTED_BY)
def test_each_program_computes_the_file_that_is_made_for_it(
    program: str, of_axes: tuple[Path, dict[str, LayerWeights]], sd1_folder: Path, tmp_path: Path
) -> None:
    source, layers = of_axes
    target = PROGRAMS[program].conversion({w.norm_axis for w in layers.values() if w.magnitude
                                           is not None})  # fmt: skip
    rank = 10_000 if target == "lora" else None  # of a layer's own size it approximates nothing
    output = tmp_path / "file.safetensors"
    report = convert_adapter(source, output, program, FitSettings(rank=rank), base=sd1_folder)
    assert (report.program, CONVERSIONS[report.target].takes_rank) == (program, target == "lora")
    with PipelineFolder.open(sd1_folder) as pipeline:
        for formula in COMPUTED_BY[program]:
            for name, file in parts_by_layer(output, layers).items():
                weight = pipeline[f"{name}.weight"].double()
                wanted = meant(weight, layers[name])
                error = (formula(weight, file) - wanted).norm() / (wanted - weight).norm()
                assert error < 1e-4, (formula, name)


def written(source: Path, output: Path, target: str, **options: Any) -> Path | str:
    """The file that a conversion writes, or the reason why the target has none."""
    fit = FitSettings(rank=10_000)  # of a layer's own size it approximates nothing
    try:
        return convert_adapter(source, output, target, fit, overwrite=True, **options).path
    except (AdapterFormatError, ExportError) as error:
        return str(error)


def assert_has_the_strength(
    file: Path, folder: Path, layers: dict[str, LayerWeights], strength: float
) -> None:
    """Compare each layer with what `export --strength` merges; a fit is less exact."""
    is_fit = "approximation" in inspect_adapter(file).metadata.extra
    try:
        found = read_adapter(file).layers
    except AdapterFormatError:  # It is made for one base model: as ComfyUI computes it.
        found = {}
        files = sorted(file.iterdir()) if file.is_dir() else [file]
        parts = [parts_by_layer(one, layers) for one in files]
    for name, layer in layers.items():
        weight = weights_of(folder)[f"{name}.weight"]
        expected = merge_tensor(weight, [(layer, Strengths(strength))]).double()
        weight = weight.double()
        got = meant(weight, found[name]) if found else weight
        for part in [] if found else parts:
            got = comfyui(got, part[name]) if part[name] else got
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= (1e-5 if is_fit else 1e-6), name


@pytest.mark.filterwarnings("ignore:rank has no effect")
@pytest.mark.parametrize("target", TARGETS)
def test_a_weaker_file_is_the_adapter_at_that_strength(
    target: str, of_axes: tuple[Path, dict[str, LayerWeights]], sd1_folder: Path, tmp_path: Path
) -> None:
    """Refused where the whole adapter is; without the base where nothing needs it."""
    source, layers = of_axes
    for base in (sd1_folder, None):
        whole = written(source, tmp_path / "whole", target, base=base)
        weaker = written(source, tmp_path / "weaker", target, base=base, strength=0.7)
        if base is None and any(layer.magnitude is not None for layer in layers.values()):
            needs = (
                "strength 0.7 of a DoRA depends on the base's weights; give that model with --base"
            )
            assert weaker in ([whole, needs] if isinstance(whole, str) else [needs])
        elif isinstance(whole, str):
            assert weaker == whole
        else:
            assert isinstance(weaker, Path)
            assert_has_the_strength(weaker, sd1_folder, layers, 0.7)
            assert inspect_adapter(weaker).metadata.extra["strength"] == "0.7"


def test_a_weaker_file_keeps_what_is_beside_its_layers(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Strengths multiply, half precision is not rounded again, and trained words are kept."""
    layers = random_adapter(sd1_folder, every=7)
    tokens = {"<mug>": {"text_encoder": torch.ones(32)}}
    source = write_adapter(
        tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1"), tokens=tokens),
        dtype=torch.float16,
    )  # fmt: skip
    layers = read_adapter(source).layers
    paths = [str(tmp_path / name / "a.safetensors") for name in ("half", "quarter")]
    for path, into in zip([str(source), paths[0]], paths, strict=True):
        command = ["convert", path, into, "--to", "diffusers", "--base", str(sd1_folder)]
        assert main([*command, "--strength", "0.5"]) == 0
        assert "note: strength 0.5 does not change its trained words" in capsys.readouterr().out
    assert main(["inspect", paths[1]]) == 0
    assert re.search(r"^strength +0.25$", capsys.readouterr().out, re.MULTILINE)
    assert read_adapter(paths[1]).tokens["<mug>"]["text_encoder"].flatten().tolist() == [1.0] * 32
    assert_has_the_strength(Path(paths[1]), sd1_folder, layers, 0.25)
    for strength, message in (("0", "must be greater than 0"), ("11", "between -10 and 10")):
        assert main([*command, "--strength", strength, "--overwrite"]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(ExportError, match="strength is -1; it must be greater than 0"):
        convert_adapter(source, tmp_path / "b", "diffusers", base=sd1_folder, strength=-1)
