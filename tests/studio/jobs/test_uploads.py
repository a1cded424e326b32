"""Uploads: refused by what they are, and re-encoded."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from dora_diffusion.data.photos import mask_path
from dora_diffusion.sampling.images import save_image
from dora_diffusion.studio.jobs import uploads
from dora_diffusion.studio.jobs.store import UserError
from dora_diffusion.studio.jobs.uploads import edit_photo, read_generation_settings, store_photos
from tests.studio.jobs.helpers import photo


def huge_png(path: Path, side: int = 12_000) -> Path:
    """144 megapixels in a few kilobytes: a decompression bomb."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((side // 8 + 1) * side), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def refused(file: Path, folder: Path) -> str:
    result = store_photos([file], folder)
    assert result.accepted == ()
    assert list(folder.iterdir()) == []
    return result.refused[0]


def test_names_are_made_by_the_server(tmp_path: Path, folder: Path) -> None:
    first = photo(tmp_path / "..; rm -rf $(x) &b.jpg")
    result = store_photos([first, photo(tmp_path / "b.png")], folder)
    assert [path.name for path in result.accepted] == ["001.jpg", "002.jpg"]


def test_exif_and_gps_are_gone_and_the_turn_is_applied(tmp_path: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera of Ann"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 0.0)
    source = photo(tmp_path / "a.jpg", exif=exif, comment=b"secret")
    before = source.read_bytes()
    (stored,) = store_photos([source], folder).accepted
    with Image.open(stored) as image:
        assert image.size == (64, 96)
        assert dict(image.getexif()) == {}
        assert "comment" not in image.info
    assert b"Ann" not in stored.read_bytes()
    assert source.read_bytes() == before


def test_a_crop_of_a_large_photo_is_that_of_what_was_seen(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept at half its size, turned by the camera, and cropped by fractions: one quarter is red."""
    monkeypatch.setattr("dora_diffusion.data.images.FULL_SIZE_PIXELS", 200_000)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right: the lower left quarter comes to the upper left
    image = Image.new("RGB", (800, 512), "blue")
    image.paste("red", (0, 256, 400, 512))
    image.save(tmp_path / "large.jpg", exif=exif, quality=95, subsampling=0)
    (stored,) = store_photos([tmp_path / "large.jpg"], folder).accepted
    with Image.open(stored) as kept:
        assert kept.size == (256, 400)
    edit_photo(stored, (0, 0, 0.5, 0.5), Image.new("L", (64, 100), 255))
    with Image.open(stored) as crop, Image.open(mask_path(stored)) as mask:
        assert crop.size == mask.size == (128, 200)
        red, green, blue = ImageStat.Stat(crop).mean
    assert red > 250 > 5 > max(green, blue)


def test_what_is_appended_to_an_image_is_not_kept(tmp_path: Path, folder: Path) -> None:
    source = photo(tmp_path / "a.jpg")
    source.write_bytes(source.read_bytes() + b"PK\x03\x04<script>alert(1)</script>")
    (stored,) = store_photos([source], folder).accepted
    assert b"script" not in stored.read_bytes()


def test_alpha_is_kept_as_png(tmp_path: Path, folder: Path) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (10, 10, 30, 30))
    image.save(tmp_path / "a.png")
    (stored,) = store_photos([tmp_path / "a.png"], folder).accepted
    with Image.open(stored) as kept:
        assert kept.getpixel((20, 20)) == (0, 255, 0, 255)
        assert kept.getpixel((1, 1))[3] == 0


def test_an_animation_gives_its_first_frame(tmp_path: Path, folder: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    (stored,) = store_photos([tmp_path / "a.webp"], folder).accepted
    with Image.open(stored) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert image.getpixel((5, 5))[0] > 200


NO_PHOTOS = [
    (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "a.svg"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png"),
    (b"GIF89a" + b"\0" * 40, "a.jpg"),
    (b"just text", "a.jpg"),
    (b"", "a.jpg"),
    (b"\xff\xd8\xff\xe0" + b"\0" * 64, "a.jpg"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.png"),
]


@pytest.mark.parametrize(("content", "name"), NO_PHOTOS)
def test_what_is_no_photo_is_refused_whatever_its_name(
    tmp_path: Path, folder: Path, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused(tmp_path / name, folder)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = huge_png(tmp_path / "bomb.png")
    assert bomb.stat().st_size < 40_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert "megapixels" in refused(bomb, folder)


def test_a_large_file_is_refused_unread(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    assert "above the limit" in refused(photo(tmp_path / "a.png"), folder)


def test_links_folders_and_large_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    lines = [_refused(file)]
    file.mkdir()
    lines.append(_refused(file))
    file.rmdir()
    (tmp_path / "real").write_bytes(b"text")
    file.symlink_to(tmp_path / "real")
    lines.append(_refused(file))
    assert {*lines} == {"a.png: not an ordinary file"}
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(uploads.MAX_BYTES + 2**20)
    assert _refused(file) == ("a.png: 101.0 MB is above the limit of 100 MB; save a smaller copy")


def _refused(file: Path) -> str:
    with pytest.raises(UserError) as refusal:
        read_generation_settings(file)
    return str(refusal.value)


def test_a_link_is_refused(tmp_path: Path, folder: Path) -> None:
    os.symlink(photo(tmp_path / "real.jpg"), tmp_path / "link.jpg")
    assert "not an ordinary file" in refused(tmp_path / "link.jpg", folder)


def test_more_photos_than_a_subject_may_have_are_refused_at_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 2)
    one = photo(tmp_path / "a.jpg")
    store_photos([one], folder)
    with pytest.raises(UserError, match="at most 2"):
        store_photos([one, one], folder)
    assert len(list(folder.iterdir())) == 1


def test_uploads_at_once_lose_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both pause where they have a number and not yet a file."""
    paused = threading.Barrier(2)
    next_number = uploads.next_number

    def number_and_wait(folder: Path) -> int:
        number = next_number(folder)
        with contextlib.suppress(threading.BrokenBarrierError):
            paused.wait(0.2)
        return number

    monkeypatch.setattr(uploads, "next_number", number_and_wait)
    with ThreadPoolExecutor(2) as pool:
        files = [[photo(tmp_path / f"{a}{b}.jpg") for a in "12"] for b in "34"]
        results = [*pool.map(lambda some: store_photos(some, folder), files)]
    accepted = sorted(path.name for result in results for path in result.accepted)
    assert accepted == sorted(path.name for path in folder.iterdir())
    assert accepted == ["001.jpg", "002.jpg", "003.jpg", "004.jpg"]
    assert [result.refused for result in results] == [(), ()]


def test_names_from_outside_cannot_write_on_the_terminal() -> None:
    assert uploads.shown("a\x1b[31m\n.jpg") == "a?[31m?.jpg"


def test_only_images_that_say_how_they_were_made_load(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    for name, match in (("a.png", "does not say"), ("b.png", "cannot be read")):
        with pytest.raises(UserError, match=match):
            read_generation_settings(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_settings_load_from_every_format_that_states_them(tmp_path: Path, suffix: str) -> None:
    text = "a dog\nSteps: 3, Seed: 7"
    path = save_image(Image.new("RGB", (32, 32)), tmp_path / f"a{suffix}", text)
    assert read_generation_settings(path) == text
    (tmp_path / f"b{suffix}").write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"damaged or too large|does not say how"):
        read_generation_settings(tmp_path / f"b{suffix}")
