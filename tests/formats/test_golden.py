"""Files that earlier versions wrote are read, bit for bit; `golden/VERSION/description.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.cli.main import main
from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from dora_diffusion.formats.adapter.inspect import numbers as described_numbers
from tests.formats.golden.formula import factors, magnitude, numbers

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = {path.parent: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(GOLDEN.glob("*/description.json"))}  # fmt: skip
FILES = [(folder, name) for folder, version in VERSIONS.items() for name in version["files"]]
FOR_ONE_BASE = ("comfyui", "dense")


def of_target(*targets: str) -> Any:
    return pytest.mark.parametrize(
        ("folder", "name"),
        [(f, n) for f, n in FILES if VERSIONS[f]["files"][n]["target"] in targets],
        ids=lambda value: value if isinstance(value, str) else value.name,
    )


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_the_files_are_those_that_were_written(folder: Path) -> None:
    """None was changed, added to its version, or regenerated."""
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "description.json"
    }
    assert hashes == VERSIONS[folder]["sha256"]


@of_target("diffusers", "peft", "kohya")
def test_layers_are_read_bit_for_bit(folder: Path, name: str) -> None:
    layers = VERSIONS[folder]["files"][name]["layers"]
    adapter = read_adapter(folder / name)
    assert adapter.layers.keys() == layers.keys()
    assert not adapter.assumptions
    for layer, facts in layers.items():
        found, (down, up) = adapter.layers[layer], factors(layer, facts["shape"], facts["rank"])
        # A scale that is a power of two may be multiplied in, exactly.
        assert torch.equal(found.down, down), layer
        assert torch.equal(found.scale * found.up, facts["alpha"] / facts["rank"] * up), layer
        if facts["axis"] is None:
            assert found.magnitude is None, layer
        else:
            assert found.norm_axis == facts["axis"], layer
            expected = magnitude(layer, facts["shape"], facts["axis"])
            assert torch.equal(found.magnitude, expected), layer


@of_target("diffusers", "peft", "kohya", *FOR_ONE_BASE)
def test_what_they_say_of_themselves_is_read(folder: Path, name: str) -> None:
    described = VERSIONS[folder]["files"][name]
    facts, layers = described["metadata"], described["layers"]
    report = inspect_adapter(folder / name)
    for field in ("family", "base_model", "trigger"):
        assert getattr(report.metadata, field) == facts[field], field
    assert report.metadata.resolutions == ((facts["resolution"],) if facts["resolution"] else ())
    assert dict(facts["extra"].items() - report.metadata.extra.items()) == {}
    assert report.metadata.format_version == facts["format_version"]
    if described["target"] != "peft":
        assert report.metadata.tags == tuple(facts["tags"])
        assert report.metadata.thumbnail == facts["thumbnail"]
        assert report.metadata.tag_frequency == facts["tag_frequency"]
    key_format = "kohya" if described["target"] in FOR_ONE_BASE else described["target"]
    assert report.key_format == key_format
    assert sum(report.layers.values()) == len(layers)
    if described["target"] != "dense":
        axes = {layer["axis"] for layer in layers.values()}
        method = "DoRA and LoRA" if len(axes) == 2 else "LoRA" if axes == {None} else "DoRA"
        assert report.method == method
        assert report.norm_axis == next(iter(axes - {None}), "")
    for field in ("rank", "alpha"):
        wanted = {layer: float(values[field]) for layer, values in layers.items()}
        found = described_numbers(getattr(report, field))
        found = found if isinstance(found, dict) else dict.fromkeys(layers, found)
        assert {layer: float(value) for layer, value in found.items()} == wanted


@of_target(*FOR_ONE_BASE)
def test_files_for_one_base_are_still_refused_as_adapters(folder: Path, name: str) -> None:
    with pytest.raises(AdapterFormatError, match=r"one base model|full differences"):
        read_adapter(folder / name)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_trained_tokens_are_what_they_were(folder: Path) -> None:
    for token, shape in VERSIONS[folder]["tokens"].items():
        word = token.strip("<>")
        file = folder / "embeddings" / f"tokens_{word}.safetensors"
        [(key, vectors)] = load_file(file).items()
        assert key == token
        assert torch.equal(vectors, numbers(token, shape))


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_checkpoint_is_resumed(
    tmp_path: Path, folder: Path, samples_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own settings and no step left, so that its adapter is what the run writes."""
    monkeypatch.chdir(tmp_path)
    run = folder / "run"
    command = ["train", "--config", str(run / "config.yaml"), "--output_dir", "out"]
    command += ["--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main([*command, "--instance_data_dir", str(samples_root / "bolt_mug")]) == 0
    written = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    parts = {"down": "lora_A.weight", "up": "lora_B.weight",
             "magnitude": "lora_magnitude_vector.weight"}  # fmt: skip
    digests = {}
    for name in VERSIONS[folder]["trained"]:
        module, _, part = name.replace(".default.", ".").rpartition(".")
        tensor = written.pop(f"{module}.{parts[part]}")
        digests[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert digests == VERSIONS[folder]["trained"]
    assert not written
