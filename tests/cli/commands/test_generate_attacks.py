"""``generate`` on hostile files and values: one line each, no model loaded, nothing lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, PngImagePlugin

from dora_diffusion.cli.main import main
from dora_diffusion.sampling.images import save_image
from tests.every import every


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(data, format=kind)
    return data.getvalue()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": written(b""),
    "folder": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to(path.with_name("gone")),
    "link to itself": lambda path: path.symlink_to(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "1 GB": sparse,
    "program": written(b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 20),
    "archive": written(b"PK\x03\x04" + bytes(range(256)) * 20),
    "pixel bomb": written(png(header(40_000, 40_000), (b"IDAT", b""))),
    "cut PNG": written(encoded("PNG")[:2000]),
    "cut JPEG": written(encoded("JPEG")[:500]),
    "text bomb": lambda path: path.write_bytes(
        png(header(64, 64), (b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**27), 9)))
    ),
}
# Flags that name a file -> the hostile files that they can take after all.
FLAGS: dict[str, tuple[str, ...]] = {
    "image": (),
    "mask_image": (),
    "repeat": (),
    "adapters_file": (),
    "config": ("empty",),
    "adapter": (),
    "base": (),
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Run the command, which must fail with one line, write nothing and load no model."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, **values: Any) -> str:
        reached = "generate.generate_images" if "base" in values else "load.load_components"
        monkeypatch.setattr(f"dora_diffusion.sampling.{reached}", lambda *args, **options: 1 / 0)
        given = {"base": "embedded:tiny-sd", "prompt": "a dog", "output": "x.png", **values}
        before = {path: path.lstat().st_size for path in tmp_path.rglob("*")}
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        assert main(["generate", *words, *flags]) == 1
        assert {path: path.lstat().st_size for path in tmp_path.rglob("*")} == before
        error = capfd.readouterr().err
        assert "Traceback" not in error
        *_, line = error.splitlines()
        assert line.startswith("error: ")
        assert len(line) < 1000
        assert "ZeroDivisionError" not in line
        return line

    return run


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/zero")
@pytest.mark.parametrize("flag", FLAGS)
def test_hostile_files_are_one_line(flag, refused, tmp_path):
    with every() as case:
        for kind in (name for name in FILES if name not in FLAGS[flag]):
            folder = tmp_path / kind
            folder.mkdir()
            with case(kind):
                check_hostile_file(flag, kind, refused, folder)
            shutil.rmtree(folder)


def check_hostile_file(flag, kind, refused, tmp_path):
    suffix = {"image": ".png", "mask_image": ".png", "repeat": ".png"}
    suffix |= {"adapter": ".safetensors", "base": ".safetensors"}
    file = tmp_path / f"hostile{suffix.get(flag, '.yaml')}"
    FILES[kind](file)
    if flag == "mask_image":
        save_image(Image.new("RGB", (64, 64)), tmp_path / "image.png")
        line = refused(image=tmp_path / "image.png", mask_image=file)
    else:
        line = refused(**{flag: file})
    assert "hostile" in line
    if kind == "pixel bomb" and "image" in flag:
        assert "40000 x 40000 is" in line, "it was refused by its size, before it was decoded"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 8 * 10**9}, "width is 8000000000; it must be at most 8192"),
        ({"num_images": 10**9}, "num_images is 1000000000; it must be at most 10000"),
        ({"prompt": "dog " * 30_000}, "a prompt of 120000 characters is too long; the most are"),
        ({"negative_prompt": "x" * 120_000}, "a prompt of 120000 characters is too long"),
    ],
    ids=["width", "num_images", "prompt", "negative"],
)
def test_huge_values_are_one_line(values, message, refused):
    """Of each kind one; the other limits: tests/sampling/test_generate.py."""
    assert message in refused(**values)


NAMES = (
    "../../../../etc", "/etc/passwd", "..", ".", "~", "org/../name", "org/name/../../x", "a/b/c",
    "https://example.com/model", "file:///etc/passwd", "embedded:../../etc", "embedded:/etc",
    "org/na\tme", "-x/-y", "a" * 300, "org/\u202ename",
)  # fmt: skip


@pytest.mark.parametrize("flag", ["base", "adapter"])
def test_names_that_lead_elsewhere_are_one_line(flag, refused):
    with every() as case:
        for name in NAMES:
            with case(name):
                refused(**{flag: name})


def test_texts_that_grow_without_end_are_one_line(refused, tmp_path):
    """YAML in which each level is many times the one before."""
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "steps: *a12"]), "utf-8")
    assert "bomb.yaml" in refused(config=tmp_path / "bomb.yaml")
    (tmp_path / "deep.yaml").write_text("steps: " + "[" * 20_000, "utf-8")
    assert "deep.yaml" in refused(config=tmp_path / "deep.yaml")
    (tmp_path / "round.yaml").write_text("steps: &a [*a]", "utf-8")
    assert "round.yaml" in refused(config=tmp_path / "round.yaml")
    entry = yaml.safe_dump([{"prompt": "a dog", "adapter": "../../../etc/passwd"}])
    (tmp_path / "rows.yaml").write_text(entry, "utf-8")
    assert "passwd" in refused(adapters_file=tmp_path / "rows.yaml")


@pytest.mark.parametrize(
    "fields",
    ["Steps: 9999999999999", "Steps: 4, Size: 99999999x99999999", "Steps: 4, CFG scale: nan",
     "Steps: 4, Seed: -5", "Steps: 4, Denoising strength: 1e999",
     f"Steps: 4, Loaded with: {json.dumps(json.dumps({'dtype': [1]}))}",
     f"Steps: 4, Loaded with: {json.dumps(json.dumps({'vae_tile_size': {}}))}",
     f"Steps: 1001, Loaded with: {json.dumps('[' * 30_000)}"],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_images_that_say_what_cannot_be_are_one_line(fields, refused, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"a dog\n{fields}")
    Image.new("RGB", (8, 8)).save(tmp_path / "said.png", pnginfo=info)
    refused(repeat=tmp_path / "said.png", prompt=None)
