"""What `convert`, `inspect`, `verify` and `export` say is what is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dora_diffusion.cli import main
from dora_diffusion.export import (
    ExportError,
    convert_adapter,
    export_checkpoint,
    inspect_adapter,
    verify_checkpoint,
)
from dora_diffusion.formats.adapter.base_targets import difference
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@pytest.fixture
def dora(tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter) -> Path:
    """A DoRA of rank 4 and alpha 3."""
    layers = random_adapter(sd1_folder, every=9)
    return write_adapter(tmp_path / "dora", AdapterFile(layers, AdapterMetadata("sd1")))


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
            wanted = difference(pipeline[f"{name}.weight"], layer)
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
    report = convert_adapter(dora, path, target, base=sd1_folder, rank=5, overwrite=True)
    if target == "lora":
        measured = total_error(sd1_folder, random_adapter(sd1_folder, every=9), path)
        assert report.total_error == pytest.approx(measured, rel=1e-3)
    assert 0.01 < report.total_error < 1
    sentence = f"exact for this LoRA, which is off the DoRA by {report.total_error:.1%}"
    assert any(line.startswith(f"{sentence}: diffusers") for line in lines)
    assert not any(line.startswith("exact:") for line in lines)
    tools = inspect_adapter(path).tools
    assert tools["diffusers"].partition(": ")[0] == sentence
    assert "exact" not in tools.values()
    assert main(["inspect", str(path)]) == 0
    assert f"diffusers {sentence}" in " ".join(capsys.readouterr().out.split())
    # Again: what is lost adds up, and is still told of the DoRA.
    again = convert_adapter(path, tmp_path / "b.safetensors", target, base=sd1_folder, rank=3)
    most = report.total_error + again.total_error * (1 + report.total_error)
    verdict = inspect_adapter(again.path).tools["LyCORIS" if target == "lora" else "diffusers"]
    assert verdict == f"exact for this LoRA, which is off the DoRA by {most:.1%}"


def test_an_approximation_of_full_rank_is_exact(
    tmp_path: Path, sd1_folder: Path, dora: Path
) -> None:
    report = convert_adapter(dora, tmp_path / "a", "lora", base=sd1_folder, rank=10_000)
    assert report.total_error < 1e-5
    assert inspect_adapter(report.path).tools["LyCORIS"] == "exact"


def test_the_rank_of_an_approximation_stands_beside_its_own_alpha(
    tmp_path: Path, sd1_folder: Path, dora: Path
) -> None:
    assert inspect_adapter(dora).alpha == "3"
    report = convert_adapter(dora, tmp_path / "a", "lora-diffusers", base=sd1_folder, rank=5)
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


def test_half_precision_is_said(tmp_path: Path, sd1_folder: Path, dora: Path) -> None:
    for dtype, text in ((torch.float16, "float16: exact means up to 5e-4"),
                        (torch.bfloat16, "bfloat16: exact means up to 4e-3")):  # fmt: skip
        report = convert_adapter(
            dora, tmp_path / "a", "kohya", base=sd1_folder, dtype=dtype, overwrite=True
        )
        assert any(text in note for note in inspect_adapter(report.path).notes)
    assert not any("rounded" in note for note in inspect_adapter(dora).notes)


def no_json_in_strings(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(no_json_in_strings, value.values()))
    if isinstance(value, list):
        return all(map(no_json_in_strings, value))
    return not (isinstance(value, str) and value.startswith(("{", "[")))


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_inspect_prints_one_json_document(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, target: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, every=9, mixed_ranks=True)
    facts = AdapterMetadata("sd1", trigger="7", extra={"training_steps": "20"})
    write_adapter(tmp_path, AdapterFile(layers, facts), target)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert no_json_in_strings(report)
    assert report["metadata"]["trigger"] == "7"
    if target != "diffusers":  # which pads all layers to one rank, and notes their own
        assert report["rank"] == {name: layer.rank for name, layer in layers.items()}
        assert report["alpha"] == {name: layer.alpha for name, layer in layers.items()}
    else:
        assert set(report["rank"].values()) == {2, 3, 4}
    same = write_adapter(tmp_path / "b", AdapterFile(random_adapter(sd1_folder, every=9), facts))
    assert main(["inspect", str(same), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rank"], report["alpha"]) == (4, 3)


@pytest.mark.parametrize("target", ["comfyui", "dense"])
def test_files_for_one_base_fit_by_their_shapes(
    tmp_path: Path, sd1_folder: Path, sd2_folder: Path, random_adapter: MakeAdapter, target: str
) -> None:
    """SD1 and SD2 share all names of their UNets; the width of the prompt differs."""
    layers = random_adapter(sd1_folder, components=["unet"])
    source = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    file = convert_adapter(source, tmp_path / "b", target, base=sd1_folder).path
    fits = inspect_adapter(file, sd1_folder).fits
    assert fits.startswith(f"yes, all {len(layers)} layers by their names and shapes")
    other = inspect_adapter(file, sd2_folder)
    assert other.fits.startswith("no: it was made for another model: unet.")
    assert "(32, 32) on (32, 64)" in other.fits or "1) on (" in other.fits
    assert other.kinds == inspect_adapter(file).kinds
    text = random_adapter(sd1_folder, components=["text_encoder"])
    for_text = write_adapter(tmp_path / "t", AdapterFile(text, AdapterMetadata("sd1")))
    file = convert_adapter(for_text, tmp_path / "c", target, base=sd1_folder).path
    tensors = {k.replace("layers_2_", "layers_9_"): t for k, t in load_file(file).items()}
    save_file(tensors, file, {"dora_diffusion.target": target})
    fits = inspect_adapter(file, sd1_folder).fits
    assert fits.startswith("no: the model has no module for lora_te_text_model_encoder_layers_9_")


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
        assert "is or holds what is read" in capsys.readouterr().err
    base = tmp_path / "base.safetensors"
    export_checkpoint(sd1_folder, dora, base)
    size = base.stat().st_size
    with pytest.raises(ExportError, match="is or holds what is read"):
        convert_adapter(dora, base, "kohya", base=base, overwrite=True)
    assert (dora.read_bytes(), base.stat().st_size) == (before, size)
    peft = convert_adapter(dora, tmp_path / "peft", "peft").path
    with pytest.raises(ExportError, match="is or holds what is read"):
        convert_adapter(peft / "unet", peft, "peft", overwrite=True)
    assert (peft / "text_encoder").is_dir()
    convert_adapter(dora, dora.parent, "kohya")  # another file of the same folder


def test_verify_finds_the_merged_model_behind_the_adapters(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapters = [
        str(
            write_adapter(tmp_path / name, AdapterFile(random_adapter(sd1_folder, every=9, seed=i)))
        )
        for i, name in enumerate("ab")
    ]
    merged = str(tmp_path / "m.safetensors")
    export_checkpoint(sd1_folder, [(path, 1.0) for path in adapters], merged)
    base = ["--base", str(sd1_folder)]
    repeated = ["--adapter", adapters[0], "--adapter", adapters[1]]
    for command in (
        [merged, *base, "--adapter", *adapters],
        [*base, "--adapter", *adapters, merged],
        [*base, *repeated, merged],
        [merged, *base, *repeated],
        ["--adapter", *adapters, *base, merged],
    ):
        assert main(["verify", *command]) == 0, command
        assert capsys.readouterr().out.splitlines()[-1] == "proven"
    assert main(["verify", *base, "--adapter", adapters[0]]) == 1
    assert "the merged model is missing: dora-diffusion verify MERGED" in capsys.readouterr().err
    assert main(["verify", *base, "--adapter", *adapters]) == 1
    assert "an adapter" in capsys.readouterr().err.splitlines()[-1]
    exported = tmp_path / "n.safetensors"
    assert main(["export", *base, *repeated, "--output", str(exported)]) == 0
    assert verify_checkpoint(exported, sd1_folder, [(path, 1.0) for path in adapters]).ok


OLD_CARD = """---
license: creativeml-openrail-m
datasets: [somebody/pictures]
model-index: [{name: base}]
---
# The base

It scores 87%.
"""


def test_a_merged_folder_has_a_card_of_its_own(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """With the base linked and its licence kept; without the base's figures."""
    import shutil

    snapshot = tmp_path / "hub" / "models--somebody--base-1" / "snapshots" / ("a" * 40)
    shutil.copytree(sd1_folder, snapshot)
    (snapshot / "README.md").write_text(OLD_CARD, encoding="utf-8")
    facts = AdapterMetadata("sd1", trigger="sks dog")
    layers = random_adapter(sd1_folder, every=9)
    path = write_adapter(tmp_path / "my-dog.safetensors", AdapterFile(layers, facts), "kohya")
    merged = export_checkpoint(snapshot, [(path, 0.5)], tmp_path / "merged", unet_strength=0.8)
    card = (merged / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "somebody/base-1"
    assert head["license"] == "creativeml-openrail-m"
    assert not {"datasets", "model-index"} & head.keys()
    assert "87%" not in card
    assert "[somebody/base-1](https://huggingface.co/somebody/base-1)" in card
    assert "`my-dog.safetensors` | 0.5 |" in card
    assert "unet strength 0.8" in card
    assert "**`sks dog`**" in card
    assert str(tmp_path) not in card
    plain = export_checkpoint(sd1_folder, path, tmp_path / "plain")
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert f"`{sd1_folder.name}` with adapters merged" in card
