"""What files say of themselves, and what `inspect` says of them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_diffusion.cli import main
from dora_diffusion.export import convert_adapter, inspect_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@pytest.fixture
def adapter(sd1_folder: Path, random_adapter: MakeAdapter) -> AdapterFile:
    layers = random_adapter(sd1_folder, every=7)
    return AdapterFile(layers, AdapterMetadata("sd1", "some/model", "sks dog", 512))


def test_tags_and_thumbnail_go_along(tmp_path: Path, adapter: AdapterFile) -> None:
    """Into every target and back; the picture small, and without a photo's own metadata."""
    photo = tmp_path / "private place.jpg"
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    Image.new("RGB", (1200, 800), "red").save(photo, exif=exif)
    source = write_adapter(tmp_path / "a.safetensors", adapter)
    first = convert_adapter(
        source, tmp_path / "my dog.safetensors", "kohya", tags=["dog", "pet"], thumbnail=photo
    ).path
    fields = read_header(first).metadata
    assert fields["modelspec.tags"] == "dog, pet"
    assert json.loads(fields["ss_tag_frequency"]) == {"images": {"sks dog": 1, "dog": 1, "pet": 1}}
    head, _, data = fields["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64"
    assert (picture.format, picture.size) == ("JPEG", (256, 171))
    assert not picture.getexif()
    assert not any(str(tmp_path) in text or "private" in text for text in fields.values())
    assert fields["modelspec.implementation"] == "diffusers"
    for target in ("diffusers", "peft", "kohya"):
        convert_adapter(first, tmp_path / target, target)
        facts = read_adapter(tmp_path / target).metadata
        assert facts.tags == ("dog", "pet")
        assert facts.thumbnail == fields["modelspec.thumbnail"]
    more = convert_adapter(first, tmp_path / "more", "kohya", tags=["pet", "brown"]).path
    assert read_adapter(more).metadata.tags == ("dog", "pet", "brown")
    with pytest.raises(ValueError, match="must be a data URI"):
        AdapterMetadata(thumbnail="/home/someone/dog.jpg")


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_the_hash_is_the_one_that_web_uis_compute(
    tmp_path: Path, sd1_folder: Path, adapter: AdapterFile, target: str
) -> None:
    """SHA-256 of all that follows the header, whatever the header says."""
    source = write_adapter(tmp_path / "a.safetensors", adapter)
    path = convert_adapter(source, tmp_path / "b", target, base=sd1_folder).path
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    expected = hashlib.sha256(content[start:]).hexdigest()
    assert read_header(path).metadata["sshs_model_hash"] == expected


def test_local_names_stay_here(tmp_path: Path, sd1_folder: Path, adapter: AdapterFile) -> None:
    facts = AdapterMetadata(
        "sd1", str(tmp_path / "models" / "my base"), extra={"data": r"C:\Users\me\photos"}
    )
    for target in ("diffusers", "kohya", "peft", "comfyui", "dense"):
        source = write_adapter(tmp_path / "a.safetensors", AdapterFile(adapter.layers, facts))
        convert_adapter(source, tmp_path / target, target, base=sd1_folder)
        for file in (tmp_path / target).rglob("*"):
            if file.is_file():
                raw = file.read_bytes()
                assert str(tmp_path).encode() not in raw
                assert b"Users" not in raw
                assert b"my base" in raw or file.suffix == ".json" or target == "peft"


def test_inspect_says_if_it_fits(
    tmp_path: Path, sd1_folder: Path, sdxl_folder: Path, adapter: AdapterFile
) -> None:
    path = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    report = inspect_adapter(path)
    assert report.fits == ""
    assert report.tools["LyCORIS"] == "exact"
    assert report.tools["A1111"].startswith("wrong")
    assert inspect_adapter(path, sd1_folder).fits == f"yes, all {len(adapter.layers)} layers"
    other = inspect_adapter(path, sdxl_folder)
    assert other.fits.startswith("no: ")
    assert other.layers == report.layers
    dense = convert_adapter(path, tmp_path / "d", "dense", base=sd1_folder).path
    report = inspect_adapter(dense, sd1_folder)
    assert report.fits.startswith(
        f"yes, all {len(adapter.layers)} layers by their names and shapes"
    )
    assert report.tools["ComfyUI and Forge"] == "exact for its base: wrong with any other"


@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
def test_the_captions_tags_go_along(tmp_path: Path, adapter: AdapterFile, target: str) -> None:
    """How often each was trained with, as web UIs count them; and what is added by hand."""
    counts = {"sks dog": 4, "grass": 2}
    facts = dataclasses.replace(adapter.metadata, tag_frequency=counts)
    path = write_adapter(tmp_path / "a", dataclasses.replace(adapter, metadata=facts), target)
    assert read_adapter(path).metadata.tag_frequency == counts
    kohya = convert_adapter(path, tmp_path / "k", "kohya", tags=["pet", "grass"]).path
    fields = read_header(kohya).metadata
    assert json.loads(fields["ss_tag_frequency"]) == {"images": {**counts, "pet": 1}}
    again = convert_adapter(kohya, tmp_path / "again", target).path
    assert read_adapter(again).metadata.tag_frequency == {**counts, "pet": 1}


def test_the_tags_of_other_programs_are_read(tmp_path: Path, adapter: AdapterFile) -> None:
    """Of several datasets, whose folders' names stay behind; nonsense is left out."""
    tensors = load_file(write_adapter(tmp_path / "a.safetensors", adapter, "kohya"))
    path = tmp_path / "b.safetensors"
    counts = {"10_my secret folder": {"dog": 2, "cat": 1}, "1_other": {"cat": 4}}
    for text, expected in ((json.dumps(counts), {"cat": 5, "dog": 2}), ("[1]", {}), ("{", {})):
        save_file(tensors, path, {"ss_v2": "False", "ss_tag_frequency": text})
        assert read_adapter(path).metadata.tag_frequency == expected
    assert b"secret" not in convert_adapter(path, tmp_path / "c", "diffusers").path.read_bytes()


@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("says_family", [True, False])
def test_an_adapter_of_another_family_is_named(
    tmp_path: Path,
    sd1_folder: Path,
    sdxl_folder: Path,
    random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
    target: str,
    says_family: bool,
) -> None:
    """Not by hundreds of modules that the base lacks: by what it is, and what to do."""
    layers = random_adapter(sdxl_folder, every=9)
    path = write_adapter(tmp_path / "xl", AdapterFile(layers, AdapterMetadata("sdxl")), target)
    if not says_family:  # a second text encoder, or the width of the prompt, tells
        for file in [path] if path.is_file() else path.rglob("*.safetensors"):
            facts = {k: v for k, v in read_header(file).metadata.items() if k == "format"}
            facts |= {"dora_diffusion.component": file.parent.name} if target == "peft" else {}
            save_file(load_file(file), file, facts)
    adapter, base, output = str(path), str(sd1_folder), str(tmp_path / "out.safetensors")
    commands = [
        ["export", "--adapter", adapter, "--base", base, "--output", output],
        ["verify", str(sd1_folder), "--adapter", adapter, "--base", base],
        ["convert", adapter, output, "--to", "kohya", "--base", base],
        ["generate", "--adapter", adapter, "--base", base, "--prompt", "x", "--output", "x.png"],
    ]
    expected = (
        "this adapter was made for Stable Diffusion XL (sdxl), the base is Stable Diffusion 1 "
        "(sd1): use it with a base model of its own family, or train it again on this one"
    )
    for command in commands:
        assert main(command) == 1, command
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
    assert main(["inspect", adapter, "--base", base]) == 0
    fits = capsys.readouterr().out.partition("fits ")[2]
    assert " ".join(fits.split()).startswith(f"no: {expected}")
    assert not Path(output).exists()


def test_inspect_prints_a_table_or_json(
    tmp_path: Path, sd1_folder: Path, adapter: AdapterFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    assert main(["inspect", str(path), "--base", str(sd1_folder)]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert f"fits yes, all {len(adapter.layers)} layers" in rows
    assert "A1111 wrong: it takes the norms per input" in rows
    assert "family Stable Diffusion 1 (sd1)" in rows
    assert "trigger sks dog" in rows
    assert "rank 4" in rows
    assert max(map(len, out.splitlines())) <= 80
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tools"]["LyCORIS"] == "exact"
    assert report["metadata"]["trigger"] == "sks dog"


def test_rewriting_is_stable_with_all_facts(tmp_path: Path, adapter: AdapterFile) -> None:
    """Write, read, write: the same bytes, hashes and pictures included."""
    thumbnail = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    facts = AdapterMetadata("sd1", "some/model", "sks dog", 512, tags=("dog",), thumbnail=thumbnail)
    for target in ("kohya", "diffusers"):
        layers = adapter.layers
        one = write_adapter(tmp_path / "1" / "a.safetensors", AdapterFile(layers, facts), target)
        two = write_adapter(tmp_path / "2" / "a.safetensors", read_adapter(one), target)
        assert one.read_bytes() == two.read_bytes()
        assert all(t.dtype == torch.float32 for t in load_file(two).values())
