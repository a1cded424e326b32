"""The text in image files: where other readers look for it, and what must not be in it."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dora_diffusion
from dora_diffusion.config.images import ImageRequest
from dora_diffusion.config.schedulers import SCHEDULERS, scheduler_of
from dora_diffusion.data.images import PhotoError
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.numerics.weights import MergeStrengths, Strengths
from dora_diffusion.sampling.images import (
    RecordedAdapter,
    parameters_text,
    parse_parameters,
    read_fields,
    read_parameters,
    save_image,
    settings_of,
)
from dora_diffusion.sampling.settings import SamplingSettings
from tests.every import every

SETTINGS = SamplingSettings(steps=20, guidance_scale=7.0, scheduler="euler_a")
SUFFIXES = (".png", ".jpg", ".JPEG", ".webp")
VERSION = f"dora_diffusion {dora_diffusion.__version__}"
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
    text = parameters_text(ImageRequest(prompt, 7), SETTINGS, IMAGE.size, "embedded:tiny-sd")
    file = save_image(IMAGE, tmp_path / "image.png", text)
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
        ("./models/base.safetensors", "base"),
        ("~/models/base", "base"),
        ("C:\\Users\\me\\base.safetensors", "base"),
    ],
)  # fmt: skip
def test_no_folder_of_this_computer_is_in_it(model, shown, tmp_path, monkeypatch):
    home = tmp_path / "private-home"
    (home / "models" / "base").mkdir(parents=True)
    (home / "models" / "base.safetensors").touch()
    (home / "run").mkdir()
    (home / "run" / "pytorch_lora_weights.safetensors").write_bytes(bytes(8) + b"data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for adapter in ("run", str(home / "run"), "./run/"):
        text = parameters_text(
            ImageRequest("a sks dog", 7), SETTINGS, (16, 8), model.format(home=home),
            [RecordedAdapter.of(adapter, Strengths(0.5))],
        )  # fmt: skip
        facts = parse_parameters(text)
        assert facts["Model"] == shown
        assert (facts["Adapter"], facts["Adapter strength"]) == ("run", "0.5")
        digest = hashlib.sha256(b"data").hexdigest()[:12]
        assert facts["Lora hashes"] == f"run: {digest}"
        is_file = shown == "base" and "safetensors" in model and "Users" not in model
        assert facts.get("Model hash") == (hashlib.sha256().hexdigest()[:10] if is_file else None)
        for private in ("private-home", "models/", "Users"):
            assert private not in text


def test_a_full_disk_keeps_the_old_image_and_says_so(tmp_path, monkeypatch):
    old = save_image(IMAGE, tmp_path / "image.png", "old")
    before = old.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match=r"the disk is full: image\.png .* unchanged"):
        save_image(Image.new("RGB", (16, 8), "red"), old, "new")
    with pytest.raises(DiskFullError, match=r"other\.png .* no file was left behind"):
        save_image(IMAGE, tmp_path / "other.png")
    assert old.read_bytes() == before
    assert list(tmp_path.iterdir()) == [old]


def test_parameters_are_written_as_a1111_writes_them():
    text = parameters_text(
        ImageRequest("a photo of a sks dog", 12),
        FULL,
        (512, 768),
        "/home/me/models/base: one",
        [
            RecordedAdapter("run", MergeStrengths(0.8, 1, 0.5), "0123456789ab"),
            RecordedAdapter("a:b", MergeStrengths(0.5, text_encoder_strength=0.5), "ba9876543210"),
        ],
        extra={"Clip skip": 2},
    )
    assert text.splitlines() == [
        "a photo of a sks dog <lora:run:0.8> <lora:a_b:0.25:0.5>",
        "Negative prompt: blurred,",
        "small",
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 12, "
        'Size: 512x768, Model: "base: one", Clip skip: 2, Magnitude strength: 0.5, '
        f'Lora hashes: "run: 0123456789ab, a_b: ba9876543210", Version: {VERSION}',
    ]


@pytest.mark.parametrize(
    "prompt", ["a photo of a sks dog", "un chien très sage, 狗", 'two\nlines: "quoted", x']
)
def test_a_png_keeps_its_parameters(tmp_path, prompt):
    path = tmp_path / "new" / "image.png"
    image = Image.new("RGB", (16, 8), "teal")
    text = parameters_text(ImageRequest(prompt, 12), FULL, image.size, "embedded:tiny-sd")
    save_image(image, path, text)
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
    assert facts["Prompt"] == "a castle,"
    assert (facts["Adapter"], facts["Adapter strength"]) == ("x", "1")
    assert facts["Negative prompt"] == "fog"
    assert facts["Sampler"] == "euler_a"
    assert facts["Lora hashes"] == "x: abc, y: def"
    assert parse_parameters("only a prompt")["Prompt"] == "only a prompt"


def test_a_failed_save_keeps_the_old_image(tmp_path, monkeypatch):
    path = save_image(Image.new("RGB", (4, 4), "red"), tmp_path / "x.png", "old")

    def fail(self, file, **kwargs):
        raise OSError(5, "broken disk")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="broken disk"):
        save_image(Image.new("RGB", (4, 4), "blue"), path, "new")
    assert read_parameters(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_of_spaces_is_read_in_steps_that_grow_with_it() -> None:
    """A text of unknown origin; searched for names of any length it takes 10 ** 12 steps."""
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


def read_by_a1111(text: str) -> dict[str, str]:
    """The values that A1111 reads, by the rules of its format.

    The last line holds fields where it has three of them at least: a name of a word character and
    one or more of words, spaces, - and /, a colon, and a value in double quotes or up to the comma.
    A value in quotes is JSON. Of what is above, all from "Negative prompt:" on is negative; each
    line is stripped. A value such as 512x768 is two.
    """
    field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(field.findall(last)) < 3:
        lines, last = [*lines, last], ""
    texts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    into = "Prompt"
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            into, line = "Negative prompt", line[16:].strip()
        texts[into].append(line)
    found = {name: "\n".join(lines) for name, lines in texts.items()}
    for name, value in field.findall(last):
        if value[0] == value[-1] == '"':
            value = json.loads(value)
        if size := re.match(r"^(\d+)x(\d+)$", value):
            found |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            found[name] = value
    networks = [tag[1:-1].split(":")[1:] for tag in re.findall(r"<lora:[^>]+>", found["Prompt"])]
    found["Prompt"] = re.sub(r"<\w+:[^>]+>", "", found["Prompt"]).strip()
    return found | {"networks": networks}


def words(rng: random.Random, most: int) -> str:
    """A text of what people write, and of what separates fields."""
    pieces = [
        "dog", "a:b", "x, y", '"quoted"', "\\", "Negative prompt: fog", "Steps: 20, Seed: 3", "\n",
        "(red:1.2)", "[blue]", "狗", "🐕", "año", "  ", "<sks>", ": ", ", ", "50%", "{a|b}",
    ]  # fmt: skip
    return "sks " + " ".join(rng.choice(pieces) for _ in range(rng.randint(0, most)))


def test_random_settings_are_read_again_and_by_a1111(tmp_path):
    with every() as case:
        for number in range(200):
            with case(number):
                check_random_settings(number, tmp_path)


def check_random_settings(number, tmp_path):
    rng = random.Random(number)
    settings = SamplingSettings(
        steps=rng.randint(100, 1000),
        guidance_scale=rng.choice([0, 1, 7.5, rng.uniform(0, 30), 1e-7]),
        guidance_rescale=rng.choice([0.0, 0.7, rng.random()]),
        scheduler=rng.choice([None, *SCHEDULERS]),
        width=8 * rng.randint(2, 256),
        height=8 * rng.randint(2, 256),
        negative_prompt=words(rng, 6) if rng.random() < 0.7 else "",
    )
    seed, prompt, model = (
        rng.randrange(2**63),
        words(rng, 8),
        re.sub(r"[\n\\]", "", words(rng, 3)).strip(),
    )
    kinds = rng.uniform(-2, 2), rng.choice([1.0, 0.25])
    adapters = [
        RecordedAdapter(
            f"my {i}.v",
            MergeStrengths(rng.uniform(-1, 2), *kinds, unet_strength=rng.choice([1, 0.5])),
            f"{rng.randrange(16**12):012x}",
        )
        for i in range(rng.randint(0, 3))
    ]
    size = (settings.width, settings.height)
    text = parameters_text(
        ImageRequest(prompt, seed), settings, size, model, adapters, extra={"Clip skip": 2}
    )
    path = save_image(IMAGE, tmp_path / f"x{rng.choice(SUFFIXES)}", text)
    assert read_parameters(path) == text
    fields, theirs = read_fields(path), read_by_a1111(text)
    values, unread = settings_of(fields)
    assert unread == []
    for name, said in (("prompt", prompt), ("negative_prompt", settings.negative_prompt)):
        # To a tokenizer all spaces are one.
        assert values[name].split() == said.split()
        assert theirs[name.capitalize().replace("_", " ")].split() == said.split()
    for name in ("steps", "guidance_scale", "width", "height"):
        assert values[name] == getattr(settings, name)
    assert values.get("guidance_rescale", 0) == settings.guidance_rescale
    assert values.get("scheduler") == settings.scheduler
    assert (values["seed"], theirs["Seed"]) == (seed, str(seed))
    assert (theirs["Size-1"], theirs["Size-2"]) == tuple(map(str, size))
    assert (int(theirs["Steps"]), float(theirs["CFG scale"])) == (
        settings.steps, settings.guidance_scale,
    )  # fmt: skip
    assert fields["Model"] == theirs["Model"] == model
    assert theirs.get("Lora hashes") == (", ".join(f"{a.name}: {a.hash}" for a in adapters) or None)
    for network, adapter in zip(theirs["networks"], adapters, strict=True):
        name, *strengths = network
        own = adapter.strengths
        assert name == adapter.name
        # The text encoders' is first, and without another the UNet's too.
        assert [float(strengths[0]), float(strengths[-1])] == [
            own.strength, own.strength * own.unet_strength,
        ]  # fmt: skip
    if adapters:
        assert values.get("direction_strength", 1) == kinds[0]
        assert values.get("magnitude_strength", 1) == kinds[1]


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    # 40,000 x 40,000 pixels in a header.
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    (tmp_path / "bomb.png").write_bytes(bomb + struct.pack(">I", zlib.crc32(chunk)) + bytes(64))
    for name in ("text.png", "bomb.png", "nowhere.png"):
        with pytest.raises(PhotoError, match=f"{name} cannot be read") as error:
            read_fields(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_comments_of_either_order_of_bytes_are_read(order, tmp_path):
    exif = Image.Exif()
    text = "a dog, 狗\nSteps: 2, CFG scale: 7, Seed: 3"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(order)
    IMAGE.save(tmp_path / "x.jpg", exif=exif)
    assert read_parameters(tmp_path / "x.jpg") == text
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a dog\0"
    IMAGE.save(tmp_path / "x.jpg", exif=exif)
    assert read_parameters(tmp_path / "x.jpg") == "a dog"
    exif.get_ifd(0x8769)[0x9286] = b"JIS\0\0\0\0\0\xff"
    IMAGE.save(tmp_path / "x.jpg", exif=exif)
    assert read_parameters(tmp_path / "x.jpg") is None


def test_samplers_are_known_by_the_names_that_a1111_gives_them():
    expected = [
        *((s.a1111, s.schedule, name) for name, s in SCHEDULERS.items()),
        ("DPM++ 2M Karras", None, "dpm++_karras"),
        ("DPM++ 2M", None, "dpm++"),
        ("DPM++ 2M", "Automatic", "dpm++_karras"),
        ("Euler", None, "euler"),
        ("Euler a", "Uniform", "euler_a"),
        ("Euler", "Align Your Steps", None),
        ("DPM++ 2M SDE", "Automatic", None),
        ("DPM++ 2M SDE Exponential", None, None),
        ("DPM++ 2M SDE", None, "dpm++_sde"),
        ("Euler", "Normal", "euler"),
        # Diffusers' has timesteps in float64, which Apple's GPUs do not compute.
        ("DPM2", "Normal", None),
        ("Euler a", "Karras", None),
        ("Restart", None, None),
    ]
    assert [(*names[:2], scheduler_of(*names[:2])) for names in expected] == expected


def test_what_an_image_of_a1111_says_beyond_our_settings_is_named():
    fields = parse_parameters(
        "a castle <lora:x:0.5:0.7> <hypernet:y:1>\nSteps: 30, Sampler: Restart, Schedule type: "
        "Karras, CFG scale: 6, Seed: x, Size: 512, Face restoration: CodeFormer, RNG: CPU"
    )
    values, unread = settings_of(fields)
    assert values == {
        "prompt": "a castle ",
        "negative_prompt": "",
        "steps": 30,
        "guidance_scale": 6,
    }
    assert (fields["Adapter"], fields["Adapter strength"]) == ("x", "0.5:0.7")
    assert unread == [
        "<hypernet:y:1>", "Sampler: Restart", "Schedule type: Karras", "Seed: x", "Size: 512",
        "Face restoration: CodeFormer", "RNG: CPU",
    ]  # fmt: skip
    for text in ("a (castle:1.2)\nSteps: 30", "a castle\nNegative prompt: [old]\nSteps: 30"):
        assert settings_of(parse_parameters(text))[1] == ["weights of words in its prompts"]
    assert settings_of(parse_parameters("a (castle)\nSteps: 30, Emphasis: None"))[1] == []
