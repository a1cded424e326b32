"""Photos: listed by name, and opened, turned, checked and digested once."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.data.dataset import SampleTransform
from dora_diffusion.data.images import PhotoError, open_photo
from dora_diffusion.data.photos import (
    VIDEO_SUFFIXES,
    MaskError,
    Photo,
    list_photos,
    read_photo,
    read_photo_record,
    read_photos,
    write_photo_record,
)

PROMPT = "a photo of sks dog"


def test_a_photo_is_its_content_upright_with_its_caption(tmp_path: Path, write_images) -> None:
    [path] = write_images(tmp_path, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(path).save(path, exif=turned)
    path.with_suffix(".txt").write_text("sks dog asleep", encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    expected = Photo(path, digest, (60, 40), "sks dog asleep")
    assert read_photo(path, PROMPT) == expected
    assert (open_photo(path).height, open_photo(path).width) == expected.size
    path.with_suffix(".txt").unlink()
    again = path.rename(tmp_path / "again.png")
    assert read_photo(again, PROMPT) == Photo(again, digest, (60, 40), PROMPT)


def test_unreadable_photos_are_named_and_skipped_only_if_asked(
    tmp_path: Path, write_images
) -> None:
    write_images(tmp_path, 4)
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:200])
    (tmp_path / "04.jpg").write_text("not a photo", encoding="utf-8")
    paths = list_photos(tmp_path)
    with pytest.raises(PhotoError, match=r"2 of 5 photos unusable: 03\.png.*; 04\.jpg"):
        read_photos(paths, PROMPT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        photos = read_photos(paths, PROMPT, skip_unreadable=True)
    assert [photo.path for photo in photos] == paths[:3]
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert [line.split(":")[1].strip() for line in said] == ["03.png", "04.jpg"]
    with pytest.raises(PhotoError, match="1 of 1 photo unusable"):
        read_photos([tmp_path / "04.jpg"], PROMPT, skip_unreadable=True)


@pytest.mark.parametrize("skip", [False, True])
def test_bad_masks_are_named_and_never_skipped(tmp_path: Path, write_images, skip: bool) -> None:
    """Without its mask the whole photo would be learned."""
    photos = write_images(tmp_path, 4)
    Image.new("L", (60, 20)).save(tmp_path / "00.mask.png")
    Image.new("L", (60, 40), 255).save(tmp_path / "01.mask.png")
    (tmp_path / "02.mask.png").write_text("not an image", encoding="utf-8")
    photos[3].write_text("not a photo", encoding="utf-8")
    crops = SampleTransform(40).first_crops
    reasons = (
        r"00\.mask\.png: the mask is 60 x 20, its photo 60 x 40.*; 02\.mask\.png: not a.*; "
        r"03\.png: not a"
    )
    with pytest.raises(PhotoError, match=f"3 of 4 photos unusable: {reasons}"):
        read_photos(photos, PROMPT, mask_crops=crops, skip_unreadable=skip)
    with pytest.raises(MaskError):
        read_photo(photos[2], PROMPT, mask_crops=crops)
    assert len(read_photos(photos[:3], PROMPT)) == 3


def test_images_that_are_left_out_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.bmp", "c.TIF", "d.gif", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"left out b\.bmp, c\.TIF, d\.gif; convert them"):
        assert [path.name for path in list_photos(tmp_path)] == ["a.jpg"]


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_videos_that_are_left_out_are_named(suffix: str, tmp_path: Path) -> None:
    for name in ("a.jpg", f"clip{suffix.upper()}"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=f"left out clip{re.escape(suffix.upper())}; save frames"):
        assert [path.name for path in list_photos(tmp_path)] == ["a.jpg"]


def test_captions_and_masks_of_no_photo_and_weights_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.txt", "a.weight", "b.txt", "c.mask.png", "config.yaml"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="without effect") as said:
        list_photos(tmp_path)
    assert [str(warning.message) for warning in said] == [
        f"{tmp_path}: without effect, since no photo has their name: b.txt, c.mask.png",
        f"{tmp_path}: without effect: a.weight; give these photos a folder of their own with "
        "repeats",
    ]


def test_listing_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PhotoError, match=r"no photos .*\.jpg.*\.heic.*found notes\.txt"):
        list_photos(tmp_path)
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    with pytest.raises(PhotoError, match=r"found links to missing files \(a\.jpg\)"):
        list_photos(tmp_path)
    with pytest.raises(PhotoError, match="does not exist"):
        list_photos(tmp_path / "absent")
    with pytest.raises(PhotoError, match="is a file, not a folder"):
        list_photos(tmp_path / "notes.txt")


def test_a_missing_folder_is_named_in_full_with_its_neighbour_and_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my dog").mkdir()
    said = f"{tmp_path / 'my-dog'}: the photo folder does not exist (did you mean 'my dog'?); give"
    with pytest.raises(PhotoError, match=re.escape(said) + " a folder of photos$"):
        list_photos("my-dog")
    with pytest.raises(PhotoError, match=r"exist; .* of photos with --instance_data_dir$"):
        list_photos("x", setting="instance_data_dir")


def test_jpegs_by_their_other_names_are_listed_and_open(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.JPE", "c.jpg"):
        Image.effect_noise((20, 20), 90).save(tmp_path / name, "JPEG")
    listed = list_photos(tmp_path)
    assert [path.name for path in listed] == ["a.jfif", "b.JPE", "c.jpg"]
    assert [open_photo(path).size for path in listed] == [(20, 20)] * 3


def test_digests_alone_are_kept_and_found_from_anywhere_in_the_run(tmp_path: Path) -> None:
    photos = [Photo(Path(f"secret/{name}.jpg"), name, (8, 8), "a caption") for name in "ba"]
    file = write_photo_record(tmp_path, photos)
    assert json.loads(file.read_text(encoding="utf-8")) == {"digests": ["a", "b"]}
    inside = tmp_path / "checkpoint-1" / "adapter.safetensors"
    for path in (tmp_path, tmp_path / "adapter.safetensors", inside.parent, inside):
        assert read_photo_record(path) == {"a", "b"}


@pytest.mark.parametrize("text", [None, "no json", "[]", "{}"])
def test_without_a_readable_record_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "photos.json").write_text(text, encoding="utf-8")
    assert read_photo_record(tmp_path) is None
