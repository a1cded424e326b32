"""Uploads: every limit, and that nothing of a file but its pixels survives."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.app.photo_edits import edit_photo, read_mask, restore_original
from dora_diffusion.jobs import uploads
from dora_diffusion.jobs.subjects import (
    add_photos,
    delete_subject,
    mask_path,
    new_subject,
    photo_path,
    photo_warnings,
    photos_in,
    read_caption_of,
    read_subject,
    remove_photo,
    save_caption,
    subjects_in,
    take_sample,
    training_crop,
)
from dora_diffusion.jobs.uploads import store_photos
from dora_diffusion.jobs.workspace import AppError, Workspace

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def photo(path: Path, size: tuple[int, int] = (96, 64), **options: object) -> Path:
    image = Image.effect_noise(size, 80).convert("RGB")
    image.save(path, **options)
    return path


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


def refused(file: Path, folder: Path) -> str:
    result = store_photos([file], folder)
    assert result.accepted == ()
    assert list(folder.iterdir()) == []
    return result.refused[0]


def test_names_are_made_by_the_server(tmp_path: Path, folder: Path) -> None:
    first = photo(tmp_path / "..; rm -rf $(x) <b>.jpg")
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


def test_what_is_appended_to_a_picture_is_not_kept(tmp_path: Path, folder: Path) -> None:
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


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "a.svg"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png"),
        (b"GIF89a" + b"\0" * 40, "a.jpg"),
        (b"just text", "a.jpg"),
        (b"", "a.jpg"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 64, "a.jpg"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.png"),
    ],
)
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


def test_a_strip_is_refused(tmp_path: Path, folder: Path) -> None:
    strip = photo(tmp_path / "strip.png", (600, 20))
    assert "600 x 20 is a strip" in refused(strip, folder)


def test_a_large_file_is_refused_unread(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    assert "above the limit" in refused(photo(tmp_path / "a.png"), folder)


def test_a_link_is_refused(tmp_path: Path, folder: Path) -> None:
    os.symlink(photo(tmp_path / "real.jpg"), tmp_path / "link.jpg")
    assert "not an ordinary file" in refused(tmp_path / "link.jpg", folder)


def test_more_photos_than_a_subject_may_have_are_refused_at_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 2)
    one = photo(tmp_path / "a.jpg")
    store_photos([one], folder)
    with pytest.raises(AppError, match="at most 2"):
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


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


@pytest.fixture
def subject(workspace: Workspace, tmp_path: Path) -> str:
    subject_id = new_subject(workspace, "Dog", "dog")
    for name in ("a.jpg", "b.jpg"):
        add_photos(workspace, subject_id, [photo(tmp_path / name, (120, 80))])
    return subject_id


@pytest.mark.parametrize(
    "name", ["../001.jpg", "/etc/passwd", "", None, 3, ["001.jpg"], "001.jpg\0", "009.jpg", "."]
)
def test_a_photo_is_looked_up_by_its_bare_name(
    workspace: Workspace, subject: str, name: object
) -> None:
    with pytest.raises(AppError, match="no longer exists"):
        photo_path(workspace, subject, name)


@pytest.mark.parametrize("name", ["..", "", None, "20261125-020304-abcdef", "../subjects", 1, "*"])
def test_a_subject_is_looked_up_by_its_id(workspace: Workspace, name: object) -> None:
    with pytest.raises(AppError, match="no longer exists"):
        read_subject(workspace, name)


def test_a_linked_subject_or_photo_is_not_followed(
    workspace: Workspace, subject: str, tmp_path: Path
) -> None:
    outside = photo(tmp_path / "outside.jpg")
    os.symlink(outside, workspace.subject(subject) / "photos" / "003.jpg")
    with pytest.raises(AppError):
        photo_path(workspace, subject, "003.jpg")
    os.symlink(tmp_path, workspace.subjects / "20261125-020304-abcdef")
    with pytest.raises(AppError):
        workspace.subject("20261125-020304-abcdef")


def test_captions_are_one_printable_line_of_bounded_length(
    workspace: Workspace, subject: str
) -> None:
    text = save_caption(workspace, subject, "001.jpg", "a sks\x00 dog\x1b[2J\n on  \u202egrass")
    assert text == "a sks dog [2J on grass"
    assert read_caption_of(photo_path(workspace, subject, "001.jpg")) == text
    with pytest.raises(AppError, match="at most 1000"):
        save_caption(workspace, subject, "001.jpg", "x" * 1001)
    save_caption(workspace, subject, "001.jpg", " ")
    assert read_caption_of(photo_path(workspace, subject, "001.jpg")) == ""


def test_a_removed_photo_takes_its_caption_along(workspace: Workspace, subject: str) -> None:
    save_caption(workspace, subject, "001.jpg", "a sks dog")
    remove_photo(workspace, subject, "001.jpg")
    folder = workspace.subject(subject) / "photos"
    assert sorted(path.name for path in folder.iterdir()) == ["002.jpg"]


def png_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_crop_and_mask_can_be_undone(workspace: Workspace, subject: str) -> None:
    path = photo_path(workspace, subject, "001.jpg")  # 120 x 80
    before = path.read_bytes()
    # Painted on a preview of half the size: x 30 to 45, y 10 to 30.
    preview = Image.new("RGBA", (60, 40))
    preview.paste((227, 93, 43, 255), (30, 10, 45, 30))
    edit_photo(path, (0.25, 0.0, 0.75, 1.0), read_mask(png_address(preview)))
    with Image.open(path) as image, Image.open(mask_path(path)) as mask:
        assert image.size == mask.size == (60, 80)
        assert mask.getextrema() == (0, 255)
        # In the crop, which begins at x = 30 of the photo.
        assert mask.getpixel((45, 40)) == 255
        assert mask.getpixel((20, 40)) == mask.getpixel((45, 70)) == 0
    edit_photo(path, (0.0, 0.0, 1.0, 0.5), None)
    with Image.open(path) as image:
        assert image.size == (60, 40)
    assert not mask_path(path).exists()
    restore_original(path)
    assert path.read_bytes() == before
    assert not mask_path(path).exists()


def test_a_crop_keeps_the_alpha_mask(workspace: Workspace, tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 80), (255, 255, 255, 0))
    image.paste((0, 200, 0, 255), (30, 20, 70, 60))
    image.save(tmp_path / "cutout.png")
    subject = new_subject(workspace, "Cutout")
    (stored,) = add_photos(workspace, subject, [tmp_path / "cutout.png"]).accepted
    edit_photo(stored, (0.2, 0.0, 0.8, 1.0), None)
    with Image.open(stored) as cropped:
        assert cropped.mode == "RGBA"
        assert cropped.tobytes() == image.crop((20, 0, 80, 80)).tobytes()
    restore_original(stored)
    with Image.open(stored) as restored:
        assert restored.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "crop",
    [(0, 0, 1), (0, 0, 2, 1), (-0.1, 0, 1, 1), (0.5, 0, 0.5, 1), (0.9, 0, 0.1, 1),
     ("0", 0, 1, 1), (float("nan"), 0, 1, 1), (0, 0, 0.1, 0.1), "abcd", (None,) * 4,
     (0, 0, 1, 0.13)],
)  # fmt: skip
def test_a_crop_that_is_none_changes_nothing(
    workspace: Workspace, subject: str, crop: object
) -> None:
    path = photo_path(workspace, subject, "001.jpg")
    photo(path, (400, 300))
    before = path.read_bytes()
    with pytest.raises(AppError, match="crop"):
        edit_photo(path, crop, None)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert not (path.parent.parent / "originals").exists()


@pytest.mark.parametrize(
    "mask", ["x", "data:image/svg+xml,<svg/>", "data:image/png;base64,AAAA", 5, ["a"], "a" * 2**23]
)
def test_a_mask_that_is_no_picture_is_refused(mask: object) -> None:
    with pytest.raises(AppError, match="paint it again"):
        read_mask(mask)


def test_a_mask_is_small() -> None:
    assert read_mask("") is None
    assert read_mask(png_address(Image.new("RGBA", (8, 8)))) is not None
    with pytest.raises(AppError, match="paint it again"):
        read_mask(png_address(Image.new("L", (5000, 5000))))


def test_the_crop_shown_is_the_middle_square(workspace: Workspace, tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    image.save(tmp_path / "a.png")
    subject = new_subject(workspace, "x")
    (stored,) = add_photos(workspace, subject, [tmp_path / "a.png"]).accepted
    crop = training_crop(stored, 96)
    assert crop.size == (96, 96)
    corners = [crop.getpixel(at) for at in ((4, 4), (91, 91))]
    assert all(blue > 200 and red < 60 for red, _, blue in corners)


def test_warnings_name_the_photo(workspace: Workspace, subject: str) -> None:
    found = photo_warnings(read_subject(workspace, subject), 512)
    assert "only 2 photos" in found[""][0]
    assert any("smaller than the training size" in line for line in found["001.jpg"])


@pytest.mark.skipif(not (SAMPLES / "bolt_mug").is_dir(), reason="the samples are not there")
def test_a_sample_becomes_a_subject_with_its_captions(workspace: Workspace) -> None:
    subject = read_subject(workspace, take_sample(workspace, SAMPLES, "bolt_mug"))
    assert (subject.class_word, len(subject.photos)) == ("mug", 5)
    assert read_caption_of(subject.photos[0]).startswith("a photo of a sks mug")
    with pytest.raises(AppError, match="there is bolt_mug, heart_teapot, ring_robot"):
        take_sample(workspace, SAMPLES, "../samples/bolt_mug")


def test_subjects_are_listed_newest_first_and_deleted(workspace: Workspace, subject: str) -> None:
    assert [one.id for one in subjects_in(workspace)] == [subject]
    delete_subject(workspace, subject)
    assert subjects_in(workspace) == []
    assert photos_in(workspace.subjects / subject) == []
