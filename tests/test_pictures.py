"""The text in picture files: where other readers look for it, and what must not be in it."""

from __future__ import annotations

import errno
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.generate import SamplingSettings
from dora_diffusion.pictures import parameters_text, parse_parameters, read_parameters, save_png

SETTINGS = SamplingSettings(steps=20, guidance_scale=7.0, scheduler="euler_a")
PICTURE = Image.new("RGB", (16, 8), "teal")


def text_chunks(file: Path) -> list[tuple[str, str, str]]:
    """(chunk type, keyword, text) of a PNG's text chunks, read by the PNG standard alone."""
    data, at, found = file.read_bytes(), 8, []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        keyword, _, rest = body.partition(b"\0")
        if kind == b"tEXt":
            found.append(("tEXt", keyword.decode("latin-1"), rest.decode("latin-1")))
        elif kind == b"iTXt":
            compressed, _, rest = rest[0], rest[1], rest[2:]
            _, _, rest = rest.partition(b"\0")  # language
            _, _, rest = rest.partition(b"\0")  # translated keyword
            text = zlib.decompress(rest) if compressed else rest
            found.append(("iTXt", keyword.decode("latin-1"), text.decode("utf-8")))
        at += 12 + length
    return found


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a photo of a sks dog", "tEXt"),
        ("un año del sks niño", "tEXt"),
        ("一张 sks 狗 的照片, Ελλάδα 🐕", "iTXt"),
    ],
)
def test_the_chunk_is_one_that_every_png_reader_understands(prompt, kind, tmp_path):
    text = parameters_text(prompt, 7, SETTINGS, PICTURE.size, "embedded:tiny-sd")
    file = save_png(PICTURE, tmp_path / "picture.png", text)
    assert text_chunks(file) == [(kind, "parameters", text)]
    assert read_parameters(file) == text
    assert parse_parameters(text)["Prompt"] == prompt


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("stabilityai/sdxl-base", "stabilityai/sdxl-base"),
        ("embedded:tiny-sd", "embedded:tiny-sd"),
        ("{home}/models/base", "base"),
        ("{home}/models/base/", "base"),
        ("models/base", "base"),
        ("./models/base.safetensors", "base.safetensors"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\base.safetensors", "base.safetensors"),
    ],
)  # fmt: skip
def test_no_folder_of_this_computer_is_in_it(model, shown, tmp_path, monkeypatch):
    home = tmp_path / "private-home"
    (home / "models" / "base").mkdir(parents=True)
    (home / "models" / "base.safetensors").touch()
    (home / "run").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for adapter in ("run", str(home / "run"), "./run/"):
        text = parameters_text(
            "a sks dog", 7, SETTINGS, (16, 8), model.format(home=home), adapter, 0.5
        )
        facts = parse_parameters(text)
        assert facts["Model"] == shown
        assert facts["Adapter"] == "run"
        for private in ("private-home", "models/", "Users"):
            assert private not in text


def test_a_full_disk_keeps_the_old_picture_and_says_so(tmp_path, monkeypatch):
    old = save_png(PICTURE, tmp_path / "picture.png", "old")
    before = old.read_bytes()

    def full(self, file, **options):
        Path(file).write_bytes(before[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DiskFullError, match=r"the disk is full: picture\.png .* unchanged"):
        save_png(Image.new("RGB", (16, 8), "red"), old, "new")
    with pytest.raises(DiskFullError, match=r"other\.png .* no file was left behind"):
        save_png(PICTURE, tmp_path / "other.png")
    assert old.read_bytes() == before
    assert list(tmp_path.iterdir()) == [old]


def test_a_picture_is_replaced_whole(tmp_path):
    file = save_png(PICTURE, tmp_path / "picture.png", "old")
    save_png(Image.new("RGB", (4, 4), "red"), file, "new")
    assert read_parameters(file) == "new"
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), np.full((4, 4, 3), (255, 0, 0)))
