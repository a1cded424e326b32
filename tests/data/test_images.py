"""Opening photos: EXIF, limits, damage, colours and alpha."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from dora_diffusion.data import images
from dora_diffusion.data.crops import apply_crop, plan_crop
from dora_diffusion.data.images import PhotoError, decode_photo, open_photo
from dora_diffusion.data.photos import Photo, open_mask, read_photo


def noise_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of any size in a few kilobytes, written without an image library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # What each EXIF orientation asks of the viewer, in numpy's words.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    stored = noise_image(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    opened = open_photo(path)
    np.testing.assert_array_equal(np.asarray(opened), undo(np.asarray(stored)))


def test_metadata_with_the_place_is_dropped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "Phone 7"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)
    path = tmp_path / "photo.jpg"
    noise_image(16, 16).save(path, exif=exif, comment=b"home")
    assert dict(Image.open(path).getexif().get_ifd(0x8825))
    opened = open_photo(path)
    assert opened.info == {}
    assert not dict(opened.getexif())
    saved = io.BytesIO()
    opened.save(saved, "JPEG")
    assert b"Phone" not in saved.getvalue()
    assert b"home" not in saved.getvalue()


def test_a_100_megapixel_png_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(flat_png(10_000, 10_000))
    assert path.stat().st_size < 50_000

    def decoded(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size, line in (
            ((10_000, 10_000), "10000 x 10000 is 100.0 megapixels, above the limit of 89.5; scale "
             "its longer side to 9400 pixels or fewer"),
            ((30_000, 7_000), "30000 x 7000 is 210.0 megapixels, above the limit of 89.5; scale "
             "its longer side to 19500 pixels or fewer"),
        ):  # fmt: skip
            path.write_bytes(flat_png(*size))
            with pytest.raises(PhotoError) as error:
                open_photo(path)
            assert str(error.value) == f"huge.png: {line}"


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit by which photos of 93 x 70 pixels are halved."""
    monkeypatch.setattr("dora_diffusion.data.images.FULL_SIZE_PIXELS", 5000)


def block_means(image: Image.Image) -> np.ndarray:
    """Means of squares of 2 x 2 pixels; those at the right and the lower edge are smaller."""
    values = np.asarray(image.convert("RGB"), dtype=float)
    rows = np.stack([values[y : y + 2].mean(0) for y in range(0, image.height, 2)])
    return np.stack([rows[:, x : x + 2].mean(1) for x in range(0, image.width, 2)], axis=1)


@pytest.mark.usefixtures("halved")
def test_the_decoder_of_a_large_jpeg_computes_fewer_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (93, 70), "teal").save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "reduce", lambda *_: pytest.fail("all pixels were decoded"))
    assert decode_photo(tmp_path / "a.jpg").image.size == (47, 35)


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "mode", "error"),
    [("JPEG", "RGB", 2), ("MPO", "RGB", 2), ("PNG", "RGB", 0.6), ("PNG", "RGBA", 0.6),
     ("PNG", "P", 0.6), ("WEBP", "RGB", 4)],
)  # fmt: skip
def test_large_photos_are_halved(
    tmp_path: Path, kind: str, mode: str, error: float, orientation: int
) -> None:
    """A JPEG by its decoder; SDXL is told the size of the file."""
    y, x = np.mgrid[:70, :93]
    waves = [127 + 90 * np.sin(x / (9 + k) + k) * np.cos(y / (11 + k)) for k in range(4)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8), "RGBA")
    image = image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = [Image.new("RGB", (16, 16))] if kind == "MPO" else []
    image.save(tmp_path / "a", kind, exif=exif, quality=98, save_all=bool(more), append_images=more)
    white = Image.new("RGBA", image.size, "white")
    means = block_means(Image.alpha_composite(white, image.convert("RGBA")))
    expected = np.rot90(means, -1) if orientation == 6 else means
    opened = decode_photo(tmp_path / "a")
    assert opened.size == ((93, 70) if orientation == 6 else (70, 93))
    assert np.asarray(opened.image).shape == expected.shape
    assert np.abs(np.asarray(opened.image) - expected).mean() < error
    assert (opened.alpha is None) == (mode != "RGBA")
    if opened.alpha is not None:
        assert opened.alpha.size == opened.image.size
    cropped = apply_crop(opened.image, plan_crop(opened.size, (32, 24)))
    assert cropped.shape == (3, 32, 24)
    with pytest.raises(ValueError, match="the crop was planned for a photo of"):
        apply_crop(opened.image.crop((0, 0, 20, 15)), plan_crop(opened.size, (32, 24)))


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("is_halved", [False, True])
def test_a_mask_of_either_size_fits_its_halved_photo(tmp_path: Path, is_halved: bool) -> None:
    Image.new("RGB", (93, 70)).save(tmp_path / "a.jpg")
    mask = Image.new("L", (93, 70))
    mask.paste(255, (0, 0, 40, 70))
    (mask.reduce(2) if is_halved else mask).save(tmp_path / "a.mask.png")

    def read() -> Photo:
        return read_photo(
            tmp_path / "a.jpg", "a sks mug", mask_crops=lambda p: [plan_crop(p.size, (16, 16))]
        )

    opened = open_mask(read())
    assert opened is not None
    np.testing.assert_array_equal(np.asarray(opened)[0] > 0, np.arange(47) < 20)
    Image.new("L", (93, 60)).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match="the mask is 93 x 60, its photo 93 x 70; save it at"):
        read()


@pytest.mark.parametrize(
    ("size", "reason"),
    [((600, 1), "600 x 1 is smaller than 16 pixels; use a larger photo"),
     ((15, 15), "15 x 15 is smaller than 16 pixels; use a larger photo"),
     ((177, 16), "177 x 16 is a strip, more than 10 times as long as wide; crop it"),
     ((20, 201), "20 x 201 is a strip, more than 10 times as long as wide; crop it")],
)  # fmt: skip
def test_tiny_images_and_strips_are_refused_before_decoding(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    reason: str,
) -> None:
    path = tmp_path / "thin.png"
    path.write_bytes(flat_png(*size))

    def decoded(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(PhotoError, match=f"^thin.png: {reason}$"):
        open_photo(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_a_truncated_photo_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    buffer = io.BytesIO()
    noise_image(64, 48).save(buffer, kind)
    data = buffer.getvalue()
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(
        PhotoError, match=r"^cut\.jpg: damaged or cut short .*copy the photo"
    ) as raised:
        open_photo(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
def test_any_damage_is_refused_in_one_line_or_harmless(tmp_path: Path, kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    noise_image(40, 24).save(buffer, kind, exif=exif.tobytes())
    random = np.random.default_rng(0)
    path = tmp_path / "photo.jpg"
    reasons = []
    for _ in range(150):
        data = bytearray(buffer.getvalue())
        for place in random.integers(0, min(len(data), 600), random.integers(1, 6)):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            open_photo(path)
        except PhotoError as error:
            reasons.append(str(error))
    assert len(reasons) > 10
    assert not [reason for reason in reasons if "\n" in reason or "object at" in reason]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is a text file\n", "not a JPEG, PNG, WebP or HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG, WebP or HEIC"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG, WebP or HEIC"),
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"garbage" * 9, "damaged"),
        (b"\xff\xd8\xff" + bytes(64), "damaged"),
    ],
)
def test_other_files_named_jpg_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "fake.jpg"
    path.write_bytes(content)
    with pytest.raises(PhotoError, match=f"^fake.jpg: .*{reason}"):
        open_photo(path)


def test_alpha_is_composited_on_white_and_kept(tmp_path: Path) -> None:
    image = noise_image(26, 18, "RGBA")
    path = tmp_path / "cutout.png"
    image.save(path)
    rgb, alpha = decode_photo(path)[:2]
    values = np.asarray(image).astype(np.float64)
    weight = values[..., 3:] / 255
    expected = values[..., :3] * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(rgb) - expected).max() <= 1
    assert alpha is not None
    np.testing.assert_array_equal(np.asarray(alpha), np.asarray(image)[..., 3])
    noise_image(26, 18).save(path)
    assert decode_photo(path).alpha is None


def test_a_palette_with_a_transparent_entry_has_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (20, 16), 0)
    image.putpalette([200, 10, 10, 0, 0, 255])
    image.putpixel((1, 0), 1)
    path = tmp_path / "palette.png"
    image.save(path, transparency=1)
    rgb, alpha = decode_photo(path)[:2]
    assert rgb.getpixel((0, 0)) == (200, 10, 10)
    assert rgb.getpixel((1, 0)) == (255, 255, 255)
    assert alpha is not None
    assert alpha.getpixel((1, 0)) == 0


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.tile(np.array([0, 257, 32896, 65535], np.uint16), (16, 4))
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    grey = np.asarray(open_photo(path))[..., 0]
    np.testing.assert_array_equal(grey, np.tile([0, 1, 128, 255], (16, 4)))


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = open_photo(path).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


def test_a_wide_gamut_profile_is_converted(tmp_path: Path) -> None:
    # A profile with red and green exchanged shows plainly whether it was honoured.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(profile)
    tags = {
        bytes(swapped[at : at + 4]): at
        for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)
    }
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        swapped[green + 4 : green + 12],
        swapped[red + 4 : red + 12],
    )
    swapped = swapped.replace(
        "sRGB built-in".encode("utf-16-be"), "swap built-in".encode("utf-16-be")
    )
    path = tmp_path / "wide.png"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path, icc_profile=bytes(swapped))
    pixel = open_photo(path).getpixel((1, 1))
    assert pixel[1] > 240
    assert pixel[0] < 15
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path, icc_profile=profile)
    assert open_photo(path).getpixel((1, 1)) == (255, 0, 0)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path, icc_profile=b"damaged")
    assert open_photo(path).getpixel((1, 1)) == (255, 0, 0)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "moving.webp"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert open_photo(path).getpixel((0, 0)) == (255, 0, 0)


def test_heic_opens_upright(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "phone.HEIC"
    image = Image.new("RGB", (64, 32), (10, 200, 30))
    pillow_heif.from_pillow(image).save(path, quality=100)
    opened = open_photo(path)
    assert opened.size == (64, 32)
    assert np.abs(np.asarray(opened).astype(int) - (10, 200, 30)).max() < 8


def test_a_file_that_changed_is_opened_again_and_only_so_much_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tmp_path / "a", tmp_path / "b"
    small.write_bytes(b"old")
    large.write_bytes(b"x" * 90)
    opened: list[str] = []
    real = Path.read_bytes

    def note(path: Path) -> bytes:
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", note)
    monkeypatch.setattr(images, "_MOST_CACHED_BYTES", 60)
    with images.reading_once():
        assert [images.read_bytes(path) for path in (small, large, small, large)] == [
            b"old", b"x" * 90, b"old", b"x" * 90,
        ]  # fmt: skip
        small.write_bytes(b"newer")
        assert images.read_bytes(small) == b"newer"
    assert images.read_bytes(small) == b"newer"
    assert opened == ["a", "b", "b", "a", "a"]
