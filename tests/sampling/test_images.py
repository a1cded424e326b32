"""The text in image files: where other readers look for it, and what must not be in it."""

from __future__ import annotations

import base64
import errno
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.generate import SamplingSettings
from dora_diffusion.sampling.images import (
    parameters_text,
    parse_parameters,
    read_parameters,
    save_png,
    thumbnail,
)

SETTINGS = SamplingSettings(steps=20, guidance_scale=7.0, scheduler="euler_a")
IMAGE = Image.new("RGB", (16, 8), "teal")
FULL = SamplingSettings(
    steps=20, guidance_scale=7.5, scheduler="dpm++_karras", negative_prompt="blurred,\nsmall"
)


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
    text = parameters_text(prompt, 7, SETTINGS, IMAGE.size, "embedded:tiny-sd")
    file = save_png(IMAGE, tmp_path / "image.png", text)
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
            "a sks dog", 7, SETTINGS, (16, 8), model.format(home=home), adapter, Strengths(0.5)
        )
        facts = parse_parameters(text)
        assert facts["Model"] == shown
        assert facts["Adapter"] == "run"
        for private in ("private-home", "models/", "Users"):
            assert private not in text


def test_a_full_disk_keeps_the_old_image_and_says_so(tmp_path, monkeypatch):
    old = save_png(IMAGE, tmp_path / "image.png", "old")
    before = old.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match=r"the disk is full: image\.png .* unchanged"):
        save_png(Image.new("RGB", (16, 8), "red"), old, "new")
    with pytest.raises(DiskFullError, match=r"other\.png .* no file was left behind"):
        save_png(IMAGE, tmp_path / "other.png")
    assert old.read_bytes() == before
    assert list(tmp_path.iterdir()) == [old]


def test_an_image_is_replaced_whole(tmp_path):
    file = save_png(IMAGE, tmp_path / "image.png", "old")
    save_png(Image.new("RGB", (4, 4), "red"), file, "new")
    assert read_parameters(file) == "new"
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), np.full((4, 4, 3), (255, 0, 0)))


def test_parameters_are_written_as_a1111_writes_them():
    text = parameters_text(
        "a photo of a sks dog",
        12,
        FULL,
        (512, 768),
        "/home/me/models/base: one",
        "out/run",
        Strengths(0.8, 1, 0.5),
    )
    assert text.splitlines() == [
        "a photo of a sks dog",
        "Negative prompt: blurred,",
        "small",
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 12, Size: 512x768, "
        'Model: "base: one", Adapter: run, Adapter strength: 0.8, Magnitude strength: 0.5',
    ]


@pytest.mark.parametrize(
    "prompt", ["a photo of a sks dog", "un chien très sage, 狗", 'two\nlines: "quoted", x']
)
def test_a_png_keeps_its_parameters(tmp_path, prompt):
    path = tmp_path / "new" / "image.png"
    image = Image.new("RGB", (16, 8), "teal")
    text = parameters_text(prompt, 12, FULL, image.size, "embedded:tiny-sd")
    save_png(image, path, text)
    assert read_parameters(path) == text
    facts = parse_parameters(text)
    assert facts["Prompt"] == prompt
    assert facts["Negative prompt"] == "blurred,\nsmall"
    assert (facts["Seed"], facts["Size"]) == ("12", "16x8")
    assert (facts["Sampler"], facts["Model"]) == ("dpm++_karras", "embedded:tiny-sd")
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_parameters_of_a1111_are_read():
    facts = parse_parameters(
        "a castle, <lora:x:1>\nNegative prompt: fog\nSteps: 30, Sampler: Euler a, CFG scale: 6, "
        'Seed: 99, Size: 512x512, Lora hashes: "x: abc, y: def", Version: v1.10.1'
    )
    assert facts["Prompt"] == "a castle, <lora:x:1>"
    assert facts["Negative prompt"] == "fog"
    assert facts["Sampler"] == "euler_a"
    assert facts["Lora hashes"] == "x: abc, y: def"
    assert parse_parameters("only a prompt")["Prompt"] == "only a prompt"


def test_an_image_without_parameters_gives_none(tmp_path):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png")
    assert read_parameters(tmp_path / "x.png") is None


def test_a_failed_save_keeps_the_old_image(tmp_path, monkeypatch):
    path = save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "x.png", "old")

    def fail(self, file, **kwargs):
        raise OSError(5, "broken disk")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="broken disk"):
        save_png(Image.new("RGB", (4, 4), "blue"), path, "new")
    assert read_parameters(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_sheet_of_samples_has_a_thumbnail(tmp_path):
    for size in ((512, 7000), (15000, 14000)):
        Image.new("L", size, "gray").save(tmp_path / "sheet.png", compress_level=1)
        with pytest.raises(PhotoError):
            open_photo(tmp_path / "sheet.png")
        kind, _, data = thumbnail(tmp_path / "sheet.png").partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as small:
            assert max(small.size) == 256
            assert abs(small.width / small.height - size[0] / size[1]) < 0.01


def test_a_line_of_spaces_is_read_in_steps_that_grow_with_it() -> None:
    """What a stranger's image says; searched for names of any length it takes 10 ** 12 steps."""
    line = "Steps: 20, CFG scale: 7, Hires steps: 9," + " " * 19_000 + "x"
    assert parse_parameters(f"a dog\n{line}") == {
        "Prompt": "a dog", "Negative prompt": "", "Steps": "20", "CFG scale": "7",
        "Hires steps": "9",
    }  # fmt: skip


@pytest.mark.parametrize("value", [r'"a\x"', '"a\tb"', r'"\u12"'])
def test_a_quoted_value_that_is_no_json_is_taken_as_it_stands(value: str) -> None:
    """As other programs write it, or a hand."""
    facts = parse_parameters(f"a mug\nSteps: 2, Model: {value}, Seed: 5")
    assert (facts["Model"], facts["Seed"]) == (value.strip('"'), "5")
