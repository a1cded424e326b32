"""Large photos: decoded at a fraction of their size, in the memory of small ones."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.data import decoding
from dora_diffusion.data.crops import apply_crop, apply_crop_to_mask, plan_crop
from dora_diffusion.data.images import PhotoError, decode_photo, open_photo
from dora_diffusion.data.photos import Photo, open_mask, read_photo

SIZE = (93, 70)
ROWS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def smooth(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Other values in every channel, which change slowly."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [127 + 90 * np.sin(x / (9 + k) + k) * np.cos(y / (11 + k)) for k in range(4)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8), "RGBA")
    return image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)


def block_means(image: Image.Image, factor: int) -> np.ndarray:
    """Means of squares of pixels; those at the right and the lower edge may be smaller."""
    values = np.asarray(image.convert("RGB"), dtype=float)
    height, width = values.shape[:2]
    rows = [values[y : y + factor].mean(0) for y in range(0, height, factor)]
    return np.stack(
        [np.stack([row[x : x + factor].mean(0) for x in range(0, width, factor)]) for row in rows]
    )


def png(
    pixels: np.ndarray, colour: int, *, extra: bytes = b"", behind: bytes = b"", chunk: int = 999
) -> bytes:
    """A PNG of 8 bits a sample, each row with the next of the five filters, in small chunks."""
    height, size = pixels.shape[0], ROWS[colour]
    raw = pixels.reshape(height, -1).astype(int)
    zero = np.zeros_like(raw[0])
    rows = b""
    for y, row in enumerate(raw):
        up = raw[y - 1] if y else zero
        left, corner = (np.concatenate([zero[:size], line[:-size]]) for line in (row, up))
        guess = left + up - corner
        far = [np.abs(guess - near) for near in (left, up, corner)]
        nearest = np.where(
            (far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner)
        )
        before = (zero, left, up, (left + up) // 2, nearest)[y % 5]
        rows += bytes([y % 5]) + ((row - before) % 256).astype(np.uint8).tobytes()
    data = zlib.compress(rows)

    def part(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", pixels.shape[1], height, 8, colour, 0, 0, 0)
    parts = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + extra
        + b"".join(part(b"IDAT", body) for body in parts) + behind + part(b"IEND", b"")
    )  # fmt: skip


@pytest.fixture(params=[2, 4])
def factor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit by which `SIZE` is divided by a factor; a strip of a PNG is a few rows."""
    monkeypatch.setattr(decoding, "FULL_SIZE_MEGAPIXELS", 2e-3 if request.param == 2 else 5e-4)
    monkeypatch.setattr("dora_diffusion.data.images.FULL_SIZE_MEGAPIXELS", 0)
    monkeypatch.setattr(decoding, "_STRIP_BYTES", 3000)
    return int(request.param)


@pytest.mark.parametrize("size", [(7000, 5714), (7746, 5164), (9504, 6336), (16320, 12240)])
def test_a_side_is_halved_until_the_image_is_small_enough(size: tuple[int, int]) -> None:
    expected = 1
    while np.prod([np.ceil(side / expected) for side in size]) > 40e6:
        expected *= 2
    assert decoding.reduction(*size) == decoding.reduction(*size[::-1]) == expected


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "I;16"])
def test_a_png_is_reduced_to_the_means_of_squares(tmp_path: Path, factor: int, mode: str) -> None:
    image = smooth("L" if mode == "I;16" else mode)
    shown = image
    if mode == "I;16":
        image = Image.fromarray(np.asarray(shown).astype(np.uint16) * 257)
    image.save(tmp_path / "a.png")
    opened = open_photo(tmp_path / "a.png")
    if mode in ("LA", "RGBA"):  # Averaged as they are shown: by how opaque they are.
        rgba = image.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), rgba)
    difference = np.abs(np.asarray(opened) - block_means(shown, factor))
    assert opened.size == (-(-SIZE[0] // factor), -(-SIZE[1] // factor))
    assert difference.max() <= (2.5 if mode in ("LA", "RGBA") else 1)


@pytest.mark.parametrize("colour", ROWS)
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_every_filter_of_a_png_is_undone_across_strips(
    tmp_path: Path, factor: int, colour: int, chunk: int
) -> None:
    """Noise, so that a wrong row above would show; the whole is what one piece gives."""
    pixels = np.random.default_rng(colour).integers(0, 256, (*SIZE[::-1], ROWS[colour]), np.uint8)
    palette = np.random.default_rng(9).integers(0, 256, 768, np.uint8).tobytes()
    extra = b""
    if colour == 3:
        checksum = zlib.crc32(b"PLTE" + palette)
        extra = struct.pack(">I", 768) + b"PLTE" + palette + struct.pack(">I", checksum)
    data = png(pixels, colour, extra=extra, chunk=chunk)
    with Image.open(io.BytesIO(data)) as image:
        whole = image.convert("RGBA" if colour in (4, 6) else "RGB").reduce(factor)
    (tmp_path / "a.png").write_bytes(data)
    opened, alpha = decode_photo(tmp_path / "a.png")[:2]
    if alpha is not None:
        assert alpha.tobytes() == whole.getchannel("A").tobytes()
        whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    assert opened.tobytes() == whole.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_nearly_the_means_of_squares(
    tmp_path: Path, factor: int, mode: str, progressive: bool
) -> None:
    image = smooth(mode)
    image.save(tmp_path / "a.jpg", quality=98, subsampling=0, progressive=progressive)
    opened = np.asarray(open_photo(tmp_path / "a.jpg"), dtype=float)
    expected = block_means(image, factor)
    assert opened.shape == expected.shape
    assert np.abs(opened - expected)[:-1, :-1].max() < 12
    assert np.abs(opened - expected).mean() < 2


@pytest.mark.parametrize("kind", ["WEBP", "HEIF", "MPO"])
def test_other_kinds_are_reduced_as_a_whole(tmp_path: Path, factor: int, kind: str) -> None:
    image, options = smooth(), {"quality": 95}
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if kind == "MPO":  # As phones write them: a photo, and a smaller one behind it.
        options = {"quality": 98, "save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
    image.save(tmp_path / "a.x", kind, **options)
    opened = np.asarray(open_photo(tmp_path / "a.x"), dtype=float)
    assert opened.shape == block_means(image, factor).shape
    assert np.abs(opened - block_means(image, factor)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_reduced_photo_is_upright(
    tmp_path: Path, factor: int, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth().save(tmp_path / "a", kind, exif=exif, quality=98)
    reduced = np.asarray(open_photo(tmp_path / "a"), dtype=float)
    means = block_means(smooth(), factor)
    across, down = means[:, ::-1], means[::-1]
    upright = {
        1: means, 2: across, 3: np.rot90(means, 2), 4: down, 5: means.swapaxes(0, 1),
        6: np.rot90(means, -1), 7: np.rot90(means, 2).swapaxes(0, 1), 8: np.rot90(means),
    }[orientation]  # fmt: skip
    assert reduced.shape == upright.shape
    assert np.abs(reduced - upright).mean() < 3


def test_exif_behind_the_pixels_of_a_png_is_read(tmp_path: Path, factor: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    behind = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(png(np.asarray(smooth()), 2, behind=behind))
    opened = open_photo(tmp_path / "a.png")
    assert opened.width < opened.height
    assert opened.info == {}


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_large_file_that_is_cut_is_refused(
    tmp_path: Path, factor: int, kind: str, kept: float
) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: int(kept * buffer.tell())])
    with pytest.raises(PhotoError, match=r"^cut: damaged or cut short"):
        open_photo(tmp_path / "cut")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_reduced_photo_is_known_by_its_file_s_own_size(
    tmp_path: Path, factor: int, kind: str, orientation: int
) -> None:
    """SDXL is told it, as by sd-scripts and Diffusers, which decode all pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth().save(tmp_path / "a", kind, exif=exif, quality=98)
    with Image.open(tmp_path / "a") as whole:
        own = ImageOps.exif_transpose(whole)
    photo = read_photo(tmp_path / "a", "a sks mug")
    assert photo.size == (own.height, own.width)
    crop = plan_crop(photo.size, (32, 24))
    assert FAMILIES["sdxl"].time_ids(crop)[:2] == photo.size
    pixels = apply_crop(open_photo(tmp_path / "a"), crop)
    expected = apply_crop(own.convert("RGB"), crop)
    assert pixels.shape == (3, 32, 24)
    assert (pixels - expected).abs().mean() < 0.08
    with pytest.raises(ValueError, match="the crop was planned for a photo of"):
        apply_crop(open_photo(tmp_path / "a").crop((0, 0, 20, 15)), crop)


@pytest.mark.parametrize("is_reduced", [False, True])
def test_a_mask_of_either_size_fits_its_reduced_photo(
    tmp_path: Path, factor: int, is_reduced: bool
) -> None:
    """Upright, as the mask is drawn on what is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth().save(tmp_path / "a.jpg", exif=exif)
    mask = np.zeros(SIZE, np.uint8)  # rows are the photo's columns
    mask[:40] = 255
    drawn = Image.fromarray(mask)
    (drawn.reduce(factor) if is_reduced else drawn).save(tmp_path / "a.mask.png")

    def read() -> Photo:
        return read_photo(
            tmp_path / "a.jpg", "a sks mug", mask_crops=lambda p: [plan_crop(p.size, (16, 16))]
        )

    photo = read()
    assert photo.size == SIZE
    opened = open_mask(photo)
    assert opened is not None
    rows = -(-SIZE[0] // factor)
    assert (opened.height, opened.width) == (rows, -(-SIZE[1] // factor))
    np.testing.assert_array_equal(np.asarray(opened)[:, 0] > 0, np.arange(rows) * factor < 40)
    assert apply_crop_to_mask(opened, plan_crop(photo.size, (16, 16))).any()
    Image.new("L", (60, 93)).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match="the mask is 60 x 93, its photo 70 x 93; save it at"):
        read()


def scan(frame: int, components: int, scanned: int, between: bytes = b"") -> bytes:
    """The headers of a JPEG up to its first scan."""
    body = bytes([8, 0, 64, 0, 64, components]) + bytes(3 * components)
    head = struct.pack(">BBH", 0xFF, frame, len(body) + 2) + body
    return b"\xff\xd8" + head + between + b"\xff\xda" + bytes([0, 12, scanned]) + bytes(20)


@pytest.mark.parametrize("garbage", [b"", b"\xff\xff", b"\0\x07", b"\xff\xdd\0\4\0\1", b"\xff\xd0"])
def test_what_a_jpeg_s_decoder_would_hold_as_a_whole_has_a_lower_limit(garbage: bytes) -> None:
    """As libjpeg decides: another frame than a sequential one, or a scan without all components."""
    for frame in (n for n in range(0xC0, 0xD0) if n not in (0xC4, 0xC8, 0xCC)):
        for components in (1, 3, 4):
            for scanned in range(1, components + 1):
                rows = frame in (0xC0, 0xC1, 0xC9) and scanned == components
                data = scan(frame, components, scanned, garbage)
                most, which = decoding.megapixel_limit("JPEG", data)
                assert (most, bool(which)) == ((200, False) if rows else (70, True))
    assert decoding.megapixel_limit("JPEG", b"\xff\xd8\xff\xe0")[0] == 70


@pytest.mark.parametrize("progressive", [False, True])
def test_pillow_s_jpegs_are_told_apart(progressive: bool) -> None:
    buffer = io.BytesIO()
    smooth().save(buffer, "JPEG", progressive=progressive, exif=b"Exif\0\0" + b"\xff\xda" * 40)
    assert decoding.megapixel_limit("JPEG", buffer.getvalue())[0] == (70 if progressive else 200)


# Writes a JPEG of any height from one strip, and a flat PNG: nothing of their size is in memory.
_WRITE = """
import io, struct, sys, zlib
from pathlib import Path
from PIL import Image

def jpeg(path, width, height):
    strip, buffer = Image.linear_gradient("L").resize((width, 128)), io.BytesIO()
    Image.merge("RGB", [strip] * 3).save(
        buffer, "JPEG", quality=90, subsampling=0, restart_marker_rows=1)
    data = buffer.getvalue()
    frame, start = data.index(b"\\xff\\xc0"), data.index(b"\\xff\\xda")
    start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    rows = data[start:-2]  # of 16 rows of blocks; what is between them is counted modulo 8
    head = data[: frame + 5] + struct.pack(">H", height) + data[frame + 7 : start]
    repeats = height // 128
    Path(path).write_bytes(head + (rows + b"\\xff\\xd7") * (repeats - 1) + rows + b"\\xff\\xd9")

def png(path, width, height):
    def chunk(name, body):
        body = name + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    pack, row = zlib.compressobj(1), b"\\1" + bytes([200, 9, 90]) + bytes(3 * (width - 1))
    rows = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    Path(path).write_bytes(b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
                           + chunk(b"IEND", b""))
"""
# Half of the real limit, for half of the pixels.
_MEASURE = """
from dora_diffusion import system
from dora_diffusion.data import decoding, images
from dora_diffusion.data.images import open_photo
decoding.FULL_SIZE_MEGAPIXELS = images.FULL_SIZE_MEGAPIXELS = 20
def peak(path):
    image = open_photo(path)
    pixel = image.getpixel((image.width // 2, image.height - 1))
    print(*image.size, *pixel, system.peak_memory())
"""
# Linux counts the peak of who starts a process as that process's own: this one is small.
_APART = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1]]))
"""


def measured(tmp_path: Path, kind: str, sizes: list[tuple[int, int]]) -> list[list[float]]:
    """Width, height, a pixel and the peak memory of a process after each file that it opens."""
    names = [f"{tmp_path}/{width}x{height}" for width, height in sizes]
    write = [f"{kind}({name!r}, {w}, {h})" for name, (w, h) in zip(names, sizes, strict=True)]
    peaks = [f"peak({name!r})" for name in names]
    for body in ([_WRITE, *write], [_MEASURE, *peaks]):
        program = [sys.executable, "-c", _APART, "\n".join(body)]
        done = subprocess.run(program, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
    return [[float(value) for value in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_large_photos_take_less_memory_than_one_at_the_limit(tmp_path: Path, kind: str) -> None:
    """31 and 100 megapixels; the peak only rises at the last one, which is decoded as it is."""
    sizes = [(6656, 4608), (11520, 8704), (5120, 3840)]
    first, second, third = measured(tmp_path, kind, sizes)
    assert [tuple(row[:2]) for row in (first, second, third)] == [
        (3328, 2304), (2880, 2176), (5120, 3840)
    ]  # fmt: skip
    pixel = (200, 9, 90) if kind == "png" else (255, 255, 255)
    for row in (first, second, third):
        assert max(abs(a - b) for a, b in zip(row[2:5], pixel, strict=True)) < 6
    assert max(first[5], second[5]) + 0.03 < third[5]


def test_the_page_has_the_limits() -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "prepare.md").read_text("utf-8")
    limits = dict(re.findall(r"^\| (.+?) \| (\d+) \|$", text.partition("## Large photos")[2], re.M))
    interlaced = bytes(24) + bytes([8, 2, 0, 0, 1])
    found = {
        "JPEG": ("JPEG", scan(0xC0, 3, 3)),
        "PNG with 8 bits per channel": ("PNG", bytes(24) + bytes([8, 2, 0, 0, 0])),
        "progressive JPEG": ("JPEG", scan(0xC2, 3, 3)),
        "other PNG": ("PNG", interlaced),
        "HEIC": ("HEIF", b""),
        "WebP": ("WEBP", b""),
    }
    assert {name: int(limit) for name, limit in limits.items()} == {
        name: decoding.megapixel_limit(*given)[0] for name, given in found.items()
    }
