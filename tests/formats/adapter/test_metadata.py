"""Metadata of files: tags, thumbnails, hashes, no local paths."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import convert_adapter
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.metadata import (
    kohya_fields,
    parse_metadata,
    reading_in_words,
    stated_reading,
)
from dora_diffusion.formats.files.stream import read_header


def test_tags_and_thumbnail_go_along(tmp_path: Path, adapter: AdapterFile) -> None:
    """Into every target and back; the image small, and without a photo's own metadata."""
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
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64"
    assert (image.format, image.size) == ("JPEG", (256, 171))
    assert not image.getexif()
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


def test_the_tags_of_other_programs_are_read(tmp_path: Path, adapter: AdapterFile) -> None:
    """Of several datasets, whose folders' names stay behind; nonsense is left out."""
    tensors = load_file(write_adapter(tmp_path / "a.safetensors", adapter, "kohya"))
    path = tmp_path / "b.safetensors"
    counts = {"10_my secret folder": {"dog": 2, "cat": 1}, "1_other": {"cat": 4}}
    for text, expected in ((json.dumps(counts), {"cat": 5, "dog": 2}), ("[1]", {}), ("{", {})):
        save_file(tensors, path, {"ss_v2": "False", "ss_tag_frequency": text})
        assert read_adapter(path).metadata.tag_frequency == expected
    assert b"secret" not in convert_adapter(path, tmp_path / "c", "diffusers").path.read_bytes()


def test_how_prompts_are_read_goes_along_and_is_read_of_sd_scripts(adapter: AdapterFile) -> None:
    """sd-scripts counts the last layer as 1, and states a clip skip of SDXL that it ignores."""
    layers = adapter.layers
    metadata = AdapterMetadata("sd1", extra={"clip_skip": "1", "max_token_length": "225"})
    fields = kohya_fields(metadata, layers, FAMILIES["sd1"], "x")
    assert (fields["ss_clip_skip"], fields["ss_max_token_length"]) == ("2", "225")
    assert stated_reading(parse_metadata(fields).extra) == {"clip_skip": 1, "max_token_length": 225}
    fields |= {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": ""}
    assert stated_reading(parse_metadata(fields).extra) == {"max_token_length": 225}
    for text in ("None", "1", "", "-3", "x" * 99):
        plain = {
            "ss_base_model_version": "sd_v1",
            "ss_clip_skip": text,
            "ss_max_token_length": "77",
        }
        assert stated_reading(parse_metadata(plain).extra) == {}
    words = reading_in_words({"clip_skip": 1, "max_token_length": 0}, FAMILIES["sdxl"])
    assert words.startswith("with clip_skip 1 as Diffusers counts (Clip skip 3 in web UIs)")
    assert words.endswith(", all tokens in chunks of 75")
